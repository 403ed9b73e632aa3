"""Routing that prefers what is in memory: a bonus on the scores of resident experts, put into a segment's own graph.

This is the cache prior of "Mixture of Cache-Conditional Experts" (arXiv 2412.00099), with the range of the token's own
scores where the paper takes a running mean. What a layer's router says stays the rule in three ways: the first of its
choices are always taken (`kept`), what it rules out stays out (groups of experts, say), and weights are made of its own
scores, whichever experts are taken.

The graph ends with values, ids = TopK(scores), from which a model makes weights in its own way: softmax before or
after, sigmoid, normalised or not. So only the TopK is replaced:

    ids = TopK(judged + range(judged) * (bonus + 4 * kept)) if any bonus else TopK(scores)
    values = GatherElements(scores, ids)

`judged` are the scores or, where these are a softmax, its logits: the same order, but not crowded together near 0.
A layer that chooses in another way is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime as ort

from pocketmoe.bundle.manifest import MoeLayer
from pocketmoe.errors import BadInput
from pocketmoe.runtime.backends.onnx_wire import encoded, fields, integers, rewritten, text, walk

BONUS = "pocketmoe.bonus"  # input, float32 [experts]: 0 to 1, by how much of the range to raise each
ROUTED = "pocketmoe.routed"  # output, int64 [tokens, top_k]: what the router itself would choose

_REMEDY = "Leave --prefer-cached out."
_RESHAPING = {"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten"}
_CHOOSING = {"TopK", "ArgMax"}
_FLOAT, _INT64 = 1, 7  # TensorProto.DataType

# `certain`: above any bonus and the range together. `no_score`: what is below is minus infinity or nearly so.
_CONSTANTS: dict[str, int | float] = {"last": -1, "zero": 0.0, "certain": 4.0, "no_score": -1e30}
_MASKED = "ruled_out = Equal(judged, mask)"
_UNMASKED = "ruled_out = Less(judged, no_score)"
_STEPS = """
    own_values, routed = TopK(scores, k)
    least_kept = Slice(own_values, kept_from, kept_to, last)
    is_kept = GreaterOrEqual(scores, least_kept)
    highest = ReduceMax(judged, last)
    admitted = Where(ruled_out, highest, judged)
    lowest = ReduceMin(admitted, last)
    range = Sub(highest, lowest)
    admitted_bonus = Where(ruled_out, zero, bonus)
    rise = Where(is_kept, certain, admitted_bonus)
    risen_by = Mul(range, rise)
    risen = Add(judged, risen_by)
    risen_values, preferred = TopK(risen, k)
    most = ReduceMax(bonus, last)
    any = Greater(most, zero)
    ids = Where(any, preferred, routed)
    values = GatherElements(scores, ids)
"""


class _Node(NamedTuple):
    op_type: str
    inputs: list[str]
    outputs: list[str]
    numbers: dict[str, int]  # attributes


def kept(top_k: int) -> int:
    """How many of its first choices a router always gets: one of two, two of four and more."""
    return min(2, max(1, top_k // 2))


class CacheAwareRouting:
    """How strongly an engine's routing prefers what is in memory, and how often that changed a choice."""

    def __init__(self, strength: float, layers: Sequence[MoeLayer]) -> None:
        """`strength`: 0 to 1, 0 for exact routing. Raises BadInput for a model whose every choice is a first one."""
        if strength and all(layer.top_k <= kept(layer.top_k) for layer in layers):
            raise BadInput("a token takes one expert in each layer, its router's first choice", _REMEDY)
        self._strength = np.float32(strength)
        self._layers = layers
        self.on = strength > 0
        self.replaced = 0  # choices that the router would not have made
        self.choices = 0  # of decode steps

    @property
    def replaced_share(self) -> float:
        """Of all choices of decode steps."""
        return self.replaced / self.choices if self.choices else 0.0

    def models(self, graphs: Sequence[Path]) -> list[bytes]:
        """What takes the place of the graphs before the MoE layers, in their order; nothing with exact routing.

        Raises BadInput for a layer whose experts are chosen in a way that cannot be changed like this.
        """
        if not self.on:
            return []
        pairs = zip(graphs, self._layers, strict=True)
        return [preferring_segment(graph, index, layer) for index, (graph, layer) in enumerate(pairs)]

    def provide(self, values: dict[str, ort.OrtValue], layer: int, residents: np.ndarray, preferring: bool) -> None:
        """Put what `bonus` gives for residents, bool [experts or more], among a segment's inputs."""
        values[BONUS] = ort.OrtValue.ortvalue_from_numpy(self.bonus(layer, residents, preferring))

    def bonus(self, layer: int, residents: np.ndarray, preferring: bool) -> np.ndarray:
        """What to give as `BONUS`, float32 [experts], for residents, bool [experts or more].

        Nothing unless `preferring`, nor where all of the layer are in memory: that step is exact to the bit.
        """
        mine = residents[: self._layers[layer].n_experts]
        return self._strength * (mine & (preferring and not mine.all()))

    def note(self, expert_ids: np.ndarray, values: Mapping[str, ort.OrtValue]) -> None:
        """Count what one token got, int64 [1, top_k], against what its router said, which the segment gave."""
        routed = values[ROUTED].numpy()
        self.replaced += len(set(expert_ids.ravel().tolist()) - set(routed.ravel().tolist()))
        self.choices += expert_ids.size


def preferring_segment(graph: Path, index: int, layer: MoeLayer) -> bytes:
    """The graph of the segment before MoE layer `index`, with the input `BONUS` and the output `ROUTED`.

    Raises BadInput for a layer whose experts are chosen in a way that cannot be changed like this.
    """
    try:
        return with_bonus(graph.read_bytes(), layer.expert_ids, layer.expert_weights, kept(layer.top_k))
    except ValueError as reason:
        raise BadInput(f"MoE layer {index} cannot prefer experts in memory: {reason}", _REMEDY) from reason


def with_bonus(model: bytes, expert_ids: str, expert_weights: str, n_kept: int) -> bytes:
    """A model whose values `expert_ids` and `expert_weights` come of one TopK, with that replaced as above.

    Raises ValueError, which says why, for any other.
    """
    return rewritten(memoryview(model), 7, lambda graph: _graph_with_bonus(graph, expert_ids, expert_weights, n_kept))


def _graph_with_bonus(graph: memoryview, expert_ids: str, expert_weights: str, n_kept: int) -> bytes:
    maker = {name: node for node in map(_read, fields(graph, 1)) for name in node.outputs if name}
    choice = _choice(maker, expert_ids)
    _check_weights(maker, choice, expert_weights)
    parts: list[bytes] = []
    for number, field, value in walk(graph):
        if number == 1 and isinstance(value, memoryview) and _read(value).outputs == choice.outputs:
            parts += [encoded(1, node) for node in _preferring(maker, choice, n_kept)]
        else:
            parts.append(bytes(field))
    return b"".join([*parts, encoded(11, _port(BONUS, _FLOAT, rank=1)), encoded(12, _port(ROUTED, _INT64))])


def _read(node: memoryview) -> _Node:
    def names(number: int) -> list[str]:
        return [bytes(name).decode() for name in fields(node, number)]

    numbers = {text(attribute, 1): _signed(next(integers(attribute, 3), 0)) for attribute in fields(node, 5)}
    return _Node(text(node, 4), names(1), names(2), numbers)


def _signed(value: int) -> int:
    """Of a variable-length integer, which holds negative numbers as 64 bits."""
    return value - (1 << 64) if value >> 63 else value


def _choice(maker: dict[str, _Node], expert_ids: str) -> _Node:
    """The TopK whose second output the ids are. Raises ValueError."""
    name, passed = expert_ids, {expert_ids}
    while (node := maker.get(name)) and node.op_type in _RESHAPING and node.inputs and node.inputs[0] not in passed:
        name = node.inputs[0]
        passed.add(name)
    if node is None or node.op_type != "TopK" or node.outputs[1:] != [name] or len(node.inputs) != 2:
        raise ValueError(f"its experts are not chosen by one TopK but by {node.op_type if node else 'a subgraph'}")
    largest, axis, ordered = (
        node.numbers.get(key, usual) for key, usual in (("largest", 1), ("axis", -1), ("sorted", 1))
    )
    if (largest, ordered) != (1, 1) or axis not in (-1, 1):  # of [tokens, experts]
        raise ValueError("its TopK does not take the largest of the last axis, in order")
    return node


def _check_weights(maker: dict[str, _Node], choice: _Node, expert_weights: str) -> None:
    """The weights follow from the TopK, and from nothing else that chooses, but what its scores are made of.

    Raises ValueError.
    """
    known = set(_behind(maker, [choice.inputs[0]], set()))
    met = set(_behind(maker, [expert_weights], known | {*choice.outputs}))
    if not met & {*choice.outputs}:
        raise ValueError("its weights do not follow from its choice")
    others = {maker[name].op_type for name in met - known - {*choice.outputs} if name in maker}
    if others & _CHOOSING:
        raise ValueError(f"its weights are chosen apart, by {' and '.join(sorted(others & _CHOOSING))}")


def _behind(maker: dict[str, _Node], names: list[str], stops: set[str]) -> Iterator[str]:
    """The values and what they are made of, not looking past `stops`."""
    todo, seen = list(names), set(names)
    while todo:
        name = todo.pop()
        yield name
        node = None if name in stops else maker.get(name)
        new = [] if node is None else [read for read in node.inputs if read not in seen]
        seen.update(new)
        todo += new


def _preferring(maker: dict[str, _Node], choice: _Node, n_kept: int) -> Iterator[bytes]:
    """The nodes that take the place of the TopK, in order."""
    scores, k = choice.inputs
    values, ids = choice.outputs
    softmax = maker.get(scores)
    judged = softmax.inputs[0] if softmax and softmax.op_type == "Softmax" and softmax.inputs else scores
    mask = _masked_with(maker, judged)
    known = {"scores": scores, "k": k, "judged": judged, "bonus": BONUS, "routed": ROUTED, "ids": ids, "mask": mask}
    known["values"] = values or "pocketmoe.values"
    for name, value in {**_CONSTANTS, "kept_from": n_kept - 1, "kept_to": n_kept}.items():
        kind = "value_ints" if isinstance(value, int) else "value_floats"
        yield _node("Constant", [], [f"pocketmoe.{name}"], _attribute(kind, [value]))
    steps = [_MASKED if mask else _UNMASKED, *_STEPS.strip().splitlines()]
    for step in steps:
        outputs, op_type, inputs = re.split(r" = |\(", step.strip().rstrip(")"))
        reads, makes = (
            [known.get(name, f"pocketmoe.{name}") for name in part.split(", ")] for part in (inputs, outputs)
        )
        axis = [_attribute("axis", -1)] if op_type == "GatherElements" else []
        yield _node(op_type, reads, makes, *axis)


def _masked_with(maker: dict[str, _Node], judged: str) -> str:
    """The constant that a Where puts in the place of scores that the router rules out; "" where no Where does that."""
    mask = maker.get(judged)
    fills = [name for name in mask.inputs[1:] if name not in maker] if mask and mask.op_type == "Where" else []
    return fills[0] if len(fills) == 1 else ""


def _node(op_type: str, inputs: list[str], outputs: list[str], *attributes: bytes) -> bytes:
    names = [encoded(1, name) for name in inputs] + [encoded(2, name) for name in outputs]
    return b"".join([*names, encoded(4, op_type), *(encoded(5, attribute) for attribute in attributes)])


def _attribute(name: str, value: int | list[int] | list[float]) -> bytes:
    """AttributeProto: .i = 3, .floats = 7, .ints = 8, .type = 20 (INT 2, FLOATS 6, INTS 7)."""
    if isinstance(value, int):
        return encoded(1, name) + encoded(3, value % (1 << 64)) + encoded(20, 2)
    if isinstance(value[0], float):
        return encoded(1, name) + b"".join(encoded(7, item) for item in value) + encoded(20, 6)
    return encoded(1, name) + b"".join(encoded(8, item % (1 << 64)) for item in value) + encoded(20, 7)


def _port(name: str, dtype: int, rank: int | None = None) -> bytes:
    """ValueInfoProto: .name = 1, .type = 2; TypeProto.tensor_type = 1; its .elem_type = 1, .shape = 2, its .dim = 1.

    An input must say its rank.
    """
    shape = b"" if rank is None else encoded(2, rank * encoded(1, b""))
    return encoded(1, name) + encoded(2, encoded(1, encoded(1, dtype) + shape))
