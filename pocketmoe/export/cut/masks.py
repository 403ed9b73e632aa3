"""Masks that attention applies by itself, and guards of rows that see no key: left out where they never act.

Which keys a token sees follows from positions and lengths alone. So nothing is concluded from how a mask is computed:
that part of the graph is run, for texts and chunks of many lengths, and what it gives is compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pocketmoe.export.cut.lengths import PAST_LENGTH, POSITIONS, TOKEN_IDS, replace_value
from pocketmoe.ort import Session, session_options

_ATTENTION = "GroupQueryAttention"
_BIAS = 10  # of its inputs
_WINDOW = "local_window_size"
_ALWAYS_GIVEN = {TOKEN_IDS, PAST_LENGTH, POSITIONS}
_HIDDEN = -1e30  # a bias from which on exp of any score is 0 beside that of a key that is seen
_LENGTHS = 41  # each past shorter than this, with each number of new tokens below it
_LARGEST = 1 << 20  # constants above this are no lengths
_CHUNK = 300  # tokens in the longest chunk that is tried

Array = npt.NDArray[Any]
_Probe = tuple[int, int]  # tokens in the caches, new ones


def drop_masks(model: ir.Model) -> int:
    """Attention loses a bias that only hides what it hides by itself: later keys, or those before a window.

    Returns how many lost theirs.
    """
    found: dict[ir.Value, int | None] = {}
    dropped = 0
    for node in model.graph:
        bias = node.inputs[_BIAS] if node.op_type == _ATTENTION and len(node.inputs) > _BIAS else None
        if bias is None or node.attributes.get_int(_WINDOW, -1) != -1:
            continue
        if bias not in found:
            found[bias] = _window(model, bias)
        window = found[bias]
        if window is None:
            continue
        node.replace_input_with(_BIAS, None)
        if window:
            node.attributes.add(ir.AttrInt64(_WINDOW, window))
        dropped += 1
    return dropped


def drop_guards(model: ir.Model) -> int:
    """A Where whose condition is the same for every token of every text becomes what it then chooses.

    Returns how many went.
    """
    graph, dropped = model.graph, 0
    found: dict[ir.Value, bool | None] = {}
    for node in list(graph):
        if node.op_type != "Where" or node.outputs[0].is_graph_output():
            continue
        condition, *choices = node.inputs
        assert condition is not None
        if condition not in found:
            found[condition] = _always(model, condition)
        chosen = None if found[condition] is None else choices[0 if found[condition] else 1]
        if chosen is None or not _fills(chosen, node):
            continue
        replace_value(node.outputs[0], chosen)
        graph.remove(node, safe=True)
        dropped += 1
    return dropped


def _fills(chosen: ir.Value, node: ir.Node) -> bool:
    """Whether a Where's choice has the shape of its output: no other input stretches it."""
    own = chosen.shape
    if own is None:
        return False
    for other in node.inputs:
        if other is None or other.shape is None or len(other.shape) > len(own):
            return False
        beside = list(own)[len(own) - len(other.shape) :]
        if any(size not in (1, mine) for size, mine in zip(other.shape, beside, strict=True)):
            return False
    return True


def _always(model: ir.Model, condition: ir.Value) -> bool | None:
    """What a condition always is; None where it depends, or cannot be told."""
    computed = _Computed.of(model, condition)
    if computed is None:
        return None
    first: bool | None = None
    for probe in computed.probes(0):
        values = computed(probe)
        if first is None and values.size:
            first = bool(values.flat[0])
        if values.dtype != np.bool_ or not (values == first).all():
            return None
    return first


def _window(model: ir.Model, bias: ir.Value) -> int | None:
    """How many keys up to its own a token sees by this bias, 0 for all; None where it is another."""
    computed = _Computed.of(model, bias)
    if computed is None:
        return None
    far = computed((2 * max((*computed.lengths, _LENGTHS)), 1))
    if not _is_of(far, far.shape[-1] - 1, 1):
        return None
    seen = int(np.count_nonzero(far.ravel() == 0))
    window = 0 if seen == far.size else seen
    for probe in computed.probes(window):
        if not _hides(computed(probe), probe, window):
            return None
    return window


def _is_of(bias: Array, past: int, tokens: int) -> bool:
    return bias.dtype == np.float32 and bias.shape == (1, 1, tokens, past + tokens)


def _hides(bias: Array, probe: _Probe, window: int) -> bool:
    """Whether a bias is 0 for the keys in the window up to each token's own, and hides those before it."""
    past, tokens = probe
    if not _is_of(bias, past, tokens):
        return False
    behind = (past + np.arange(tokens))[:, None] - np.arange(past + tokens)
    before = behind >= window if window else np.zeros_like(behind, bool)
    values = bias[0, 0]
    return bool((values[(behind >= 0) & ~before] == 0).all() and (values[before] <= _HIDDEN).all())


class _Computed:
    """A value of a graph that depends on nothing but lengths and positions, computed for any of them."""

    def __init__(self, model: ir.Model, value: ir.Value, inputs: list[ir.Value], lengths: set[int]) -> None:
        self.lengths = lengths  # the constants that it is computed from, as far as they can be lengths
        graph = ir.convenience.extract(model.graph, inputs, [value])
        proto = ir.to_proto(ir.Model(graph, ir_version=model.ir_version))
        for domain, version in model.opset_imports.items():
            if domain not in {entry.domain for entry in proto.opset_import}:
                proto.opset_import.add(domain=domain, version=version or 1)
        self._session = Session(proto.SerializeToString(), session_options(1), f"the graph of {value.name}")

    @classmethod
    def of(cls, model: ir.Model, value: ir.Value) -> _Computed | None:
        """None where it depends on what the tokens are, on states, or on the text's end."""
        nodes, leaves = _ancestors(value)
        if any(attribute.type == ir.AttributeType.GRAPH for node in nodes for attribute in node.attributes.values()):
            return None
        inputs = [leaf for leaf in leaves if not leaf.is_initializer()]
        if not inputs or not all(_is_known(leaf, nodes) for leaf in inputs):
            return None
        constants = [leaf.const_value for leaf in leaves if leaf.is_initializer()]
        if any(constant is None or constant.size > _LENGTHS for constant in constants):
            return None
        numbers = {float(n) for constant in constants if constant is not None for n in constant.numpy().ravel()}
        return cls(model, value, inputs, {abs(int(n)) for n in numbers if 1 < abs(n) <= _LARGEST and n == int(n)})

    def __call__(self, probe: _Probe) -> Array:
        past, tokens = probe
        given = {
            TOKEN_IDS: np.zeros((1, tokens), np.int64),
            PAST_LENGTH: np.array([past], np.int64),
            POSITIONS: np.arange(past, past + tokens, dtype=np.int64)[None],
        }
        return self._session.run(None, {value.name: given[value.name] for value in self._session.inputs})[0]

    def probes(self, window: int) -> Iterator[_Probe]:
        """Short texts and chunks, all of them, and those around each length that might matter, and its double."""
        yield from product(range(_LENGTHS), range(1, _LENGTHS))
        for length in sorted({*self.lengths, window} - {0}):
            for end in (length, 2 * length):
                around = (end + step for step in range(-3, 4))
                yield from ((past, tokens) for past in around if past >= 0 for tokens in (1, 2, 3, 7))
                yield max(0, end - _LENGTHS), min(_CHUNK, 2 * _LENGTHS)
            if length < _CHUNK:
                yield from ((past, min(length + 3, _CHUNK)) for past in (0, 1, length - 1, length, length + 1))


def _is_known(leaf: ir.Value, nodes: Iterable[ir.Node]) -> bool:
    """Whether a graph input has the same value for all texts of a length, or is asked for no more than its shape."""
    readers = [node for node in nodes if leaf in node.inputs]
    return leaf.name in _ALWAYS_GIVEN and (leaf.name != TOKEN_IDS or all(n.op_type == "Shape" for n in readers))


def _ancestors(value: ir.Value) -> tuple[list[ir.Node], list[ir.Value]]:
    """The nodes that a value is computed by, and the inputs and constants that they start from."""
    nodes: dict[ir.Node, None] = {}
    leaves: dict[ir.Value, None] = {}
    todo = [value]
    while todo:
        producer = todo[-1].producer()
        current = todo.pop()
        if producer is None:
            leaves[current] = None
        elif producer not in nodes:
            nodes[producer] = None
            todo += [read for read in producer.inputs if read is not None]
    return list(nodes), list(leaves)
