"""What is in a bundle."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import msgspec

from pocketmoe.bundle.reader import Bundle


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


def inspect_bundle(bundle: Bundle) -> Inspection:
    """Read it off the manifest and the index of the experts. Raises DamagedFile."""
    manifest = bundle.manifest
    by_role: Counter[str] = Counter()
    schemes = {f"experts {number}": kind.scheme for number, kind in enumerate(manifest.expert_kinds)}
    if len(schemes) == 1:
        schemes = {"experts": manifest.expert_kinds[0].scheme}
    role_schemes: dict[str, set[str]] = {}
    for tensor in manifest.dense:
        by_role[tensor.role] += tensor.nbytes
        role_schemes.setdefault(tensor.role, set()).add(tensor.scheme)
    schemes |= {role: ", ".join(sorted(found)) for role, found in sorted(role_schemes.items())}
    growing = [state for state in manifest.states if state.growing_axis is not None]
    if growing:
        schemes["caches"] = ", ".join(sorted({state.dtype for state in growing}))
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
        schemes=schemes,
        total_bytes=sum(entry.nbytes for entry in manifest.files.values()),
        files=len(manifest.files),
        states=len(manifest.states),
        state_bytes_per_token=sum(state.nbytes(1) for state in growing),
        provenance=msgspec.to_builtins(manifest.provenance),
        notes=list(manifest.notes),
    )
