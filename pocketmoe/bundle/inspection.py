"""What is in a bundle, for `inspect`, and in its model card how it is stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pocketmoe.bundle.manifest import Manifest, Provenance
from pocketmoe.bundle.reader import Bundle

CARD = "MODEL_CARD.md"
STORAGE = "## How the weights are stored"
SOURCE_CARD = "## The source's model card"


@dataclass(frozen=True)
class Inspection:
    """The fields of `inspect --json`. Bytes are those on disk."""

    architecture: str
    model_type: str
    parameters: int
    context_length: int
    vocab_size: int
    hidden_size: int
    moe_layers: int
    experts_per_layer: list[int]
    experts_per_token: list[int]
    expert_bytes: int
    dense_bytes_by_role: dict[str, int]
    schemes: dict[str, str]  # by expert kind and by dense role
    total_bytes: int
    files: int
    states: int
    state_bytes_per_token: int  # of text: key and value caches
    provenance: dict[str, Any]
    notes: list[str]
    equivalence: str = ""  # in words


def inspect_bundle(bundle: Bundle) -> Inspection:
    """Read it off the manifest and the index of the experts. Raises DamagedFile."""
    manifest = bundle.manifest
    by_role: Counter[str] = Counter()
    for tensor in manifest.dense:
        by_role[tensor.role] += tensor.nbytes
    with bundle.open_store() as store:
        expert_bytes = sum(record.nbytes for record in store.records.values())
    return Inspection(
        architecture=manifest.model.architecture,
        model_type=manifest.model.model_type,
        parameters=manifest.model.n_parameters,
        context_length=manifest.model.context_length,
        vocab_size=manifest.model.vocab_size,
        hidden_size=manifest.model.hidden_size,
        moe_layers=len(manifest.moe_layers),
        experts_per_layer=[layer.n_experts for layer in manifest.moe_layers],
        experts_per_token=[layer.top_k for layer in manifest.moe_layers],
        expert_bytes=expert_bytes,
        dense_bytes_by_role=dict(by_role),
        schemes=schemes_of(manifest),
        total_bytes=sum(entry.nbytes for entry in manifest.files.values()),
        files=len(manifest.files),
        states=len(manifest.states),
        state_bytes_per_token=sum(state.nbytes(1) for state in manifest.states if state.growing_axis is not None),
        provenance=msgspec.to_builtins(manifest.provenance),
        notes=list(manifest.notes),
        equivalence=equivalence_words(manifest.provenance),
    )


def equivalence_words(provenance: Provenance) -> str:
    """How experts' graphs were held against transformers at export; "" where the bundle does not say."""
    found = provenance.equivalence
    if found is None:
        return ""
    return (
        f"{found.experts} experts of {found.kinds} kind{'s' if found.kinds > 1 else ''} by graph and by transformers' "
        f"own forward on {found.rows} random rows, less than {found.error_below:g} of the largest output apart "
        f"({found.tolerance:g} is tolerated)"
    )


def schemes_of(manifest: Manifest) -> dict[str, str]:
    """How weights are stored, by expert kind and by dense role, and caches."""
    schemes = {f"experts {number}": kind.scheme for number, kind in enumerate(manifest.expert_kinds)}
    if len(schemes) == 1:
        schemes = {"experts": manifest.expert_kinds[0].scheme}
    role_schemes: dict[str, set[str]] = {}
    for tensor in manifest.dense:
        role_schemes.setdefault(tensor.role, set()).add(tensor.scheme)
    schemes |= {role: ", ".join(sorted(found)) for role, found in sorted(role_schemes.items())}
    caches = {state.dtype for state in manifest.states if state.growing_axis is not None}
    return schemes | ({"caches": ", ".join(sorted(caches))} if caches else {})


def write_storage(card: Path, manifest: Manifest) -> None:
    """Say in a model card how this bundle's weights are stored and by which steps, in the place of what it said before.

    Raises OSError.
    """
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    steps = [f"- {step}" for step in manifest.provenance.steps]
    rows = [f"| {part} | {scheme} |" for part, scheme in schemes_of(manifest).items()]
    told = with_section(text, STORAGE, [*steps, "", "| part | stored as |", "|---|---|", *rows])
    card.write_text(told, encoding="utf-8")


def with_section(card: str, heading: str, lines: Sequence[str]) -> str:
    """A bundle's model card with a section of ours, in the place of an older one, before the source's own card."""
    ours, mark, theirs = card.partition(f"{SOURCE_CARD}\n")
    before, _, old = ours.partition(f"{heading}\n")
    _, next_heading, after = old.partition("\n## ")
    section = "\n".join([heading, "", *lines])
    parts = (before, section, next_heading + after, mark + theirs)
    return "\n\n".join(filter(None, (part.strip() for part in parts))) + "\n"
