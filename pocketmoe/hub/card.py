"""The page that the hub shows of a bundle: its model card, with the metadata that the hub understands."""

from __future__ import annotations

import re
from typing import Any

from pocketmoe.bundle.inspection import CARD, with_section
from pocketmoe.bundle.manifest import Manifest, Provenance
from pocketmoe.bundle.reader import Bundle
from pocketmoe.hub.client import Reference, is_written_like_an_id

README = "README.md"
_USE = "## How to run it"
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")  # as the hub writes those that it knows
_TAG = re.compile(r"[A-Za-z0-9][\w.:+-]{0,60}", re.ASCII)
_MOST = 20  # of each kind of entry


def readme(bundle: Bundle, reference: Reference) -> str:
    """The text of README.md: metadata, the bundle's model card, and how to run it from there."""
    from huggingface_hub import ModelCardData

    manifest = bundle.manifest
    path = bundle.root / CARD
    body = path.read_text(encoding="utf-8") if CARD in manifest.files else f"# {manifest.provenance.source}\n"
    lines = [
        "With PocketMoE and its extra `hub`:",
        "",
        "```bash",
        f'pocketmoe run {reference} "Once upon a time"',
        f"pocketmoe pull {reference} -o BUNDLE",
        "```",
        "",
        f"The manifest's seal, by which a bundle is known: `{manifest.sha256}`",
    ]
    data = ModelCardData(**metadata(manifest))
    return f"---\n{data.to_yaml()}\n---\n\n{with_section(body, _USE, lines)}"


def metadata(manifest: Manifest) -> dict[str, Any]:
    """What the hub files a bundle under. Entries that a source wrote are left out where the hub would refuse them."""
    provenance = manifest.provenance
    bases = _base_models(provenance)
    relation = {"base_model": bases[0] if len(bases) == 1 else bases, "base_model_relation": "quantized"}
    schemes = sorted({kind.scheme for kind in manifest.expert_kinds})
    tags = ["pocketmoe", "onnx", "moe", "mixture-of-experts", manifest.model.model_type, *schemes]
    datasets = [name for name in provenance.datasets if _TAG.fullmatch(name) or is_written_like_an_id(name)][:_MOST]
    return {
        **_licence(provenance),
        **(relation if bases else {}),
        "library_name": "pocketmoe",
        "pipeline_tag": "text-generation",
        "tags": [tag for tag in dict.fromkeys(tags) if _TAG.fullmatch(tag)][:_MOST],
        **({"datasets": datasets} if datasets else {}),
    }


def _base_models(provenance: Provenance) -> list[str]:
    """The hub model that the bundle was made of; where that was a directory, what its card names."""
    named = [provenance.source] if is_written_like_an_id(provenance.source) else []
    return named or [name for name in (provenance.base_model or "").split(", ") if is_written_like_an_id(name)][:_MOST]


def _licence(provenance: Provenance) -> dict[str, str]:
    given = (provenance.licence or "").lower()
    if not given:
        return {}
    if given != "other" and _LICENCE.fullmatch(given):
        return {"license": given}
    name = provenance.licence_name or (provenance.licence if given != "other" else None)
    link = provenance.licence_link
    return {"license": "other"} | ({"license_name": name} if name else {}) | ({"license_link": link} if link else {})
