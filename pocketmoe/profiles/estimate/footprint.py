"""What a model takes in each quantization scheme: bytes on disk and in memory, from its shape or its bundle.

The fixed part is the runtime's own plan (`memory_plan`), with estimates of the process and the graphs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import padded
from pocketmoe.profiles.estimate.roofline import scheme_bits, served
from pocketmoe.profiles.estimate.shapes import Shape
from pocketmoe.runtime.engine.memory_plan import (
    LEAST_SLOTS,
    USUAL_PROCESS_BYTES,
    FixedPart,
    Load,
    ModelSizes,
    fixed_part,
    peak_bytes,
    possible_slots,
    slot_bound,
    usual_slot_bytes,
)

_GRAPH_BYTES = 50_000  # of a segment
_PACKED = 1.1  # of an expert's record: scales get sums of their blocks beside them (docs/LOG.md)
_STATE_BYTES = {"float32": 4, "int8": 1}  # of a value in the caches

Caches = Literal["float32", "int8"]
"""What tokens leave behind for later ones: `quantize --kv`."""


@dataclass(frozen=True)
class Scheme:
    """Bits of a weight, scales and zero points included; a test holds them to quantize/schemes.py.

    `float4`: experts are four-bit floats, which a slower kernel computes with. `quality`: as measured.
    """

    name: str
    expert_bits: float
    dense_bits: float
    embedding_bits: float
    quality: str
    float4: bool = False


MIXED = "mixed"
MEASURED_ON = "measured on the reference model of 12.8 million parameters, not on this one: `eval` measures yours"
CACHES_QUALITY = "mean KL 0.0006 more by int8 caches"
SCHEMES = (  # the best quality first
    Scheme("fp32", 32, 32, 32, "exact"),
    Scheme("int8", 8.5, 8.5, 8.5, "perplexity +0.05%, mean KL 0.0005"),
    Scheme("int4", 4.5625, 8.5, 8.5, "perplexity +0.1%, mean KL 0.0020"),
    Scheme("nf4", 4.5, 8.5, 8.5, "mean KL 0.0021", float4=True),
    Scheme(MIXED, 3.5, 8.5, 8.5, "mean KL 0.0044, with a text to calibrate by"),
    Scheme("int4-all", 4.28125, 4.28125, 8.5, "mean KL 0.0149, or 0.0088 with a text to calibrate by"),
)
_UNQUANTIZED = ("router", "norm")


@dataclass(frozen=True)
class Footprint:
    """A model in one scheme. `dense_bytes`: what every token reads; `mapped_bytes`: an embedding, read by rows."""

    scheme: str
    quality: str
    moe_layers: int
    experts: int
    top_k: int
    expert_bytes: int
    dense_bytes: int
    mapped_bytes: int
    dense_parameters: int  # that every token is multiplied with
    active_expert_parameters: int  # and those of its experts
    state_bytes_per_token: float
    hidden_size: int
    attention_heads: int
    vocab_size: int
    sequences: int = 1  # texts at once, which the process has memory for
    kv: Caches = "float32"
    float4: bool = False

    @property
    def routed_bytes(self) -> int:
        """All experts, each as long as its record."""
        return self.moe_layers * self.experts * padded(self.expert_bytes)

    @property
    def total_bytes(self) -> int:
        """On disk."""
        return self.routed_bytes + self.dense_bytes + self.mapped_bytes

    @property
    def packed_bytes(self) -> int:
        """On disk, of the experts once more, as a machine's CPU wants them; `pack --in-place` does without."""
        return round(_PACKED * self.routed_bytes)

    @property
    def active_expert_bytes(self) -> int:
        """Of experts, for one token."""
        return self.moe_layers * self.top_k * self.expert_bytes

    def cache_bytes(self, context: int) -> int:
        """Keys and values of texts of `context` tokens."""
        return int(self.state_bytes_per_token * context * self.sequences)

    def with_int8_caches(self) -> Footprint:
        """The same with caches in int8."""
        each = self.state_bytes_per_token * _STATE_BYTES["int8"] / _STATE_BYTES[self.kv]
        return replace(self, kv="int8", state_bytes_per_token=each, quality=f"{self.quality}; {CACHES_QUALITY}")

    def fixed_bytes(self, context: int) -> int:
        """What the process takes without slots, for texts of `context` tokens."""
        return self._fixed_part(context).without_loading

    def least_bytes(self, context: int) -> int:
        """The least budget for the whole process."""
        fixed = self._fixed_part(context)
        return peak_bytes(fixed.without_loading, fixed.loading, LEAST_SLOTS * slot_bound(self.expert_bytes))

    def budget_bytes(self, share: float, context: int) -> int:
        """With room for that share of the experts."""
        experts = self.moe_layers * self.experts
        slots = possible_slots(int(share * experts), experts)
        wanted = self.fixed_bytes(context) + slots * usual_slot_bytes(self.expert_bytes)
        return max(self.least_bytes(context), wanted)

    def share_in(self, budget_bytes: float, context: int) -> float:
        """The share of the experts that a budget has room for, at most 1; below 0 where it is too small."""
        available = budget_bytes - self.fixed_bytes(context)
        share = available / (usual_slot_bytes(self.expert_bytes) * self.moe_layers * self.experts)
        return -1.0 if budget_bytes < self.least_bytes(context) else min(1.0, share)

    def _fixed_part(self, context: int) -> FixedPart:
        segments = self.moe_layers + 1
        model = ModelSizes(
            segments=segments,
            routers=0,
            graph_bytes=_GRAPH_BYTES * segments,
            resident_bytes=self.dense_bytes,
            largest_resident_bytes=0,  # which a shape does not say
            mapped_bytes=(self.mapped_bytes,),
            expert_bytes=(self.expert_bytes,),
            experts=self.moe_layers * self.experts,
            top_k=self.top_k,
            hidden_size=self.hidden_size,
            attention_heads=self.attention_heads,
            vocab_size=self.vocab_size,
        )
        load = Load.of_text(context, sequences=self.sequences)
        return fixed_part(model, load, state_bytes=self.cache_bytes(context), process_bytes=USUAL_PROCESS_BYTES)


def footprints_of_shape(shape: Shape) -> list[Footprint]:
    """In every scheme, the best first."""
    tied = not shape.dense.get("head", 0)
    found: list[Footprint] = []
    for scheme in SCHEMES:
        small = sum(4 * shape.dense.get(role, 0) for role in _UNQUANTIZED)
        wide = sum(n for role, n in shape.dense.items() if role not in (*_UNQUANTIZED, "embedding"))
        embedding = round(shape.dense.get("embedding", 0) * scheme.embedding_bits / 8)
        found.append(
            Footprint(
                scheme=scheme.name,
                quality=scheme.quality,
                moe_layers=shape.moe_layers,
                experts=shape.experts,
                top_k=shape.top_k,
                expert_bytes=round(shape.expert_parameters * scheme.expert_bits / 8),
                dense_bytes=round(wide * scheme.dense_bits / 8) + small + (embedding if tied else 0),
                mapped_bytes=0 if tied else embedding,
                dense_parameters=served(shape).read_parameters,
                active_expert_parameters=shape.moe_layers * shape.top_k * shape.expert_parameters,
                state_bytes_per_token=shape.kv_values_per_token * _STATE_BYTES["float32"],
                hidden_size=shape.hidden_size,
                attention_heads=shape.attention_heads,
                vocab_size=shape.vocab_size,
                float4=scheme.float4,
            )
        )
    return found


def takes_int8_caches(shape: Shape) -> bool:
    """Whether `--kv int8` is for it: latents are kept as they are."""
    return shape.kv_values_per_token == shape.served_kv_values_per_token


def shape_of_bundle(bundle: Bundle) -> Shape:
    """Parameters from bytes, by the bits of their schemes."""
    manifest = bundle.manifest
    dense: dict[str, int] = {}
    for tensor in manifest.dense:
        count = round(tensor.nbytes * 8 / scheme_bits(tensor.scheme))
        dense[tensor.role] = dense.get(tensor.role, 0) + count
    layers, kinds = manifest.moe_layers, manifest.expert_kinds
    each = round(np.mean([kind.nbytes * 8 / scheme_bits(kind.scheme) for kind in kinds]))
    values = sum(
        math.prod(abs(size) for size in state.shape) for state in manifest.states if state.growing_axis is not None
    )
    return Shape(
        architecture=manifest.model.architecture,
        model_type=manifest.model.model_type,
        moe_layers=len(layers),
        experts=max(layer.n_experts for layer in layers),
        top_k=max(layer.top_k for layer in layers),
        expert_parameters=each,
        dense=dense,
        layers=len(layers),
        hidden_size=manifest.model.hidden_size,
        attention_heads=manifest.model.attention_heads,
        vocab_size=manifest.model.vocab_size,
        context_length=manifest.model.context_length,
        kv_values_per_token=values,
        served_kv_values_per_token=values,
        counted_from="the bundle",
    )


def footprints_of_bundle(bundle: Bundle) -> list[Footprint]:
    """As it is; and, where its experts are not quantized yet, in the schemes that they can be quantized to."""
    shape = shape_of_bundle(bundle)
    scheme = _scheme_of([kind.scheme for kind in bundle.manifest.expert_kinds])
    if scheme == "fp32":
        return footprints_of_shape(shape)
    known = {entry.name: entry.quality for entry in SCHEMES}
    tied = not shape.dense.get("head", 0)
    dense = bundle.manifest.dense
    embedding = sum(tensor.nbytes for tensor in dense if tensor.role == "embedding" and not tied)
    types = {state.dtype for state in bundle.manifest.states if state.growing_axis is not None}
    kv: Caches = "int8" if types == {"int8"} else "float32"
    labels = [kind.scheme for kind in bundle.manifest.expert_kinds]
    return [
        Footprint(
            scheme=scheme,
            quality=known.get(scheme, "unknown"),
            kv=kv,
            float4=all(label.startswith(("nf4", "fp4")) for label in labels),
            moe_layers=shape.moe_layers,
            experts=shape.experts,
            top_k=shape.top_k,
            expert_bytes=max(kind.nbytes for kind in bundle.manifest.expert_kinds),
            dense_bytes=sum(tensor.nbytes for tensor in dense) - embedding,
            mapped_bytes=embedding,
            dense_parameters=served(shape).read_parameters,
            active_expert_parameters=shape.moe_layers * shape.top_k * shape.expert_parameters,
            state_bytes_per_token=shape.kv_values_per_token * _STATE_BYTES[kv],
            hidden_size=shape.hidden_size,
            attention_heads=shape.attention_heads,
            vocab_size=shape.vocab_size,
        )
    ]


def _scheme_of(labels: Sequence[str]) -> str:
    """The scheme's name by how the experts are stored."""
    bits = {label.split("-", 1)[0] for label in labels}
    return bits.pop() if len(bits) == 1 else "mixed"
