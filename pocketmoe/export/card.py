"""The model card that a bundle carries: what it is, where it comes from, and the source's own card below."""

from __future__ import annotations

from pathlib import Path

from pocketmoe.bundle.inspection import CARD, SOURCE_CARD, equivalence_words, write_storage
from pocketmoe.bundle.manifest import Manifest, Provenance
from pocketmoe.export.checkpoint.checkpoint import Checkpoint


def write(checkpoint: Checkpoint, manifest: Manifest, root: Path) -> None:
    """Write MODEL_CARD.md."""
    model, provenance = manifest.model, manifest.provenance
    tools = ", ".join(f"{name} {version}" for name, version in provenance.tools.items())
    n_experts = sum(layer.n_experts for layer in manifest.moe_layers)
    lines = [
        f"# {provenance.source} (PocketMoE bundle)",
        "",
        f"The Mixture-of-Experts language model {provenance.source} ({model.architecture}), converted to ONNX graphs",
        "whose experts are read from disk when they are routed to. Run it with `pocketmoe run`.",
        "",
        f"- Parameters: {model.n_parameters:,}; MoE layers: {len(manifest.moe_layers)}; experts: {n_experts}",
        f"- Context length: {model.context_length}",
        f"- Licence: {_licence(provenance)}",
        f"- Base model: {provenance.base_model or 'not stated by the source'}",
        *([f"- Origin of the weights: {provenance.origin}"] if provenance.origin else []),
        f"- Datasets: {', '.join(provenance.datasets) or 'not stated by the source'}",
        f"- Converted: {provenance.created}, with {tools}",
        *([f"- Held against transformers: {words}"] if (words := equivalence_words(provenance)) else []),
        "- The hashes of the source's files are in manifest.json.",
    ]
    lines += [f"- Note: {note}." for note in manifest.notes]
    if checkpoint.card.strip():
        lines += ["", SOURCE_CARD, "", checkpoint.card.strip()]
    (root / CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_storage(root / CARD, manifest)


def _licence(provenance: Provenance) -> str:
    parts = (provenance.licence, provenance.licence_name, provenance.licence_link)
    return " ".join(part for part in parts if part) or "not stated by the source; ask its authors"
