"""Key and value caches in int8, where attention is ONNX Runtime's GroupQueryAttention.

A cached number x is stored as round(x / scale), clipped to [-128, 127], with one constant scale for each channel of
each head: KIVI (arXiv 2402.02750) found the outliers of keys in fixed channels. Scales come from the largest magnitudes
that a calibration text left in the caches, with a margin, since clipping costs several times what a coarser step does
(docs/LOG.md).

Keys are cached after rotary embedding, which turns pairs of channels by an angle that grows with the position. A text
shorter than those to come does not show a slow pair at every angle, but the pair's radius is the same at all of them:
so both channels get a bound on it, and what was measured on short texts holds for long ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pocketmoe.bundle.manifest import Manifest, State
from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import BadInput
from pocketmoe.quantize.graphs.rewrite import load

Floats = npt.NDArray[np.float32]

_OP = "GroupQueryAttention"
_KEYS, _VALUES, _COSINES, _KEY_SCALES, _VALUE_SCALES = 3, 4, 7, 12, 13  # of its inputs
_LARGEST = 127
_MARGIN = 1.25


@dataclass(frozen=True)
class CacheCalibration:
    """Largest magnitudes by the name of a state's input, float32 [heads, head size], and where they come from."""

    ranges: Mapping[str, Floats]
    source: str  # for the provenance: how many tokens of which text


def find_caches(bundle: Bundle) -> tuple[str, ...]:
    """The states, by the name of their input, that can become int8.

    Raises BadInput when there is none, because attention is of another kind or the caches are int8 already.
    """
    names = {str(value.name): None for _, model in _graphs(bundle.root, bundle.manifest) for value in _caches(model)}
    found = tuple(state.input for state in bundle.manifest.states if state.input in names)
    if not found:
        int8 = any(state.dtype == "int8" for state in bundle.manifest.states)
        why = "its caches are int8 already" if int8 else f"its attention is not {_OP}, the only one with int8 caches"
        raise BadInput(f"{bundle.root}: {why}", "Quantize it without --kv.")
    return found


def quantize_caches(root: Path, manifest: Manifest, calibration: CacheCalibration) -> Manifest:
    """Rewrite the segments in the directory `root` for int8 caches; the manifest that then describes them.

    Raises BadInput for ranges that are not finite, or not of a state's shape.
    """
    states = {state.input: state for state in manifest.states}
    scales = {name: _channel_ranges(states[name], found) for name, found in calibration.ranges.items()}
    done: set[str] = set()
    for name, model in _graphs(root, manifest):
        rewritten = rewrite(model, scales)
        if rewritten:
            (root / name).write_bytes(ir.to_proto(model).SerializeToString())
            done |= rewritten
    assert done == {*scales}, "every range must find its attention"
    step = f"quantize caches int8 per channel: {len(done)} of {len(states)} states, by {calibration.source}"
    return msgspec.structs.replace(
        manifest,
        states=tuple(msgspec.structs.replace(s, dtype="int8") if s.input in done else s for s in manifest.states),
        provenance=msgspec.structs.replace(manifest.provenance, steps=(*manifest.provenance.steps, step)),
    )


def rewrite(model: ir.Model, ranges: Mapping[str, Floats]) -> set[str]:
    """Give the attention that reads the caches in `ranges`, float32 [heads, head size], int8 ones.

    Returns the names of the caches that it found.
    """
    done: set[str] = set()
    for node in [node for node in model.graph if _is_attention(node)]:
        keys, values = node.inputs[_KEYS], node.inputs[_VALUES]
        assert keys is not None
        assert values is not None
        found = [ranges.get(str(cache.name)) for cache in (keys, values)]
        if found[0] is None or found[1] is None:
            continue
        node.resize_inputs(_VALUE_SCALES + 1)
        turned = pair_bounds(found[0], *_rotary(node))
        for place, cache, largest in ((_KEY_SCALES, keys, turned), (_VALUE_SCALES, values, found[1])):
            node.replace_input_with(place, _scales(model.graph, f"{cache.name}.scales", largest))
            cache.type = node.outputs[place - _KEY_SCALES + 1].type = ir.TensorType(ir.DataType.INT8)
            done.add(str(cache.name))
        for which in ("k_quant_type", "v_quant_type"):
            node.attributes.add(ir.AttrString(which, "PER_CHANNEL"))
        node.attributes.add(ir.AttrInt64("kv_cache_bit_width", 8))
    return done


def pair_bounds(largest: Floats, half: int, interleaved: bool) -> Floats:
    """What the first 2 * half channels of keys, [heads, head size], can reach at any position.

    A pair is channels i and i + half, or, interleaved, 2 i and 2 i + 1.
    """
    bounds = largest.copy()
    turned = bounds[:, : 2 * half]
    first, second = (turned[:, ::2], turned[:, 1::2]) if interleaved else (turned[:, :half], turned[:, half:])
    first[:] = second[:] = np.hypot(first, second)
    return bounds


def _graphs(root: Path, manifest: Manifest) -> Iterator[tuple[str, ir.Model]]:
    for segment in manifest.segments:
        yield segment.graph, load(root / segment.graph)


def _caches(model: ir.Model) -> Iterator[ir.Value]:
    for node in model.graph:
        if _is_attention(node):
            yield from (value for value in node.inputs[_KEYS : _VALUES + 1] if value is not None)


def _is_attention(node: ir.Node) -> bool:
    """GroupQueryAttention with float32 caches that nothing else reads: a graph's inputs, a graph's outputs."""
    if (node.domain, node.op_type) != ("com.microsoft", _OP) or len(node.outputs) < 3:
        return False
    before = node.inputs[_KEYS : _VALUES + 1]
    return all(
        value is not None and value.is_graph_input() and value.dtype == ir.DataType.FLOAT and len(value.uses()) == 1
        for value in before
    ) and all(value.is_graph_output() and not value.uses() for value in node.outputs[1:3])


def _rotary(node: ir.Node) -> tuple[int, bool]:
    """How many pairs of channels the attention itself turns, and whether they lie side by side."""
    cosines = node.inputs[_COSINES]
    if not node.attributes.get_int("do_rotary", 0) or cosines is None or cosines.shape is None:
        return 0, False
    half = cosines.shape[-1]
    return half if isinstance(half, int) else int(str(half)), bool(node.attributes.get_int("rotary_interleaved", 0))


def _scales(graph: ir.Graph, name: str, largest: Floats) -> ir.Value:
    """The constant [1, heads, 1, head size]; a channel that stayed zero gets the scale of one that reaches 1."""
    reach = np.float32(_MARGIN) * np.where(largest > 0, largest, np.float32(1))
    scales = reach[None, :, None] / np.float32(_LARGEST)
    value = ir.Value(name=name, const_value=ir.Tensor(scales, name=name))
    value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(scales.shape)
    graph.register_initializer(value)
    return value


def _channel_ranges(state: State, found: Floats) -> Floats:
    """The ranges of a state, checked. Raises BadInput."""
    if found.shape != (state.shape[1], state.shape[3]) or not np.isfinite(found).all():
        raise BadInput(f"the ranges measured for {state.input} are not finite numbers for each channel")
    return found.astype(np.float32)
