"""Made-up weights in the formats of bundles, in graphs for this runtime's kernels: an expert, products, attention.

Encoded by hand (`runtime/backends/onnx_wire`), since the onnx package is not there where bundles run. Field numbers are
those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np

from pocketmoe.runtime.backends.onnx_wire import encoded

_FLOAT, _UINT8, _INT32, _INT64 = 1, 2, 6, 7
_INT, _EXTERNAL = 2, 1  # AttributeProto.type, TensorProto.data_location
_MICROSOFT = "com.microsoft"
_OF_MICROSOFT = ("MatMulNBits", "MatMulBnb4", "GroupQueryAttention")
RECORD = "record"  # the file that an expert's weights are in


@dataclass(frozen=True)
class Form:
    """How weights are stored, as manifests name it."""

    scheme: str
    bits: int
    block: int
    zero_points: bool = False
    float4: bool = False

    def tensors(self, n: int, k: int) -> list[tuple[str, int, tuple[int, ...]]]:
        """Names, types and shapes of what a matrix [n, k] is made of."""
        blocks = k // self.block
        if self.float4:
            return [("codes", _UINT8, (n * k // 2,)), ("scales", _FLOAT, (n * blocks,))]
        found = [("codes", _UINT8, (n, blocks, self.block * self.bits // 8)), ("scales", _FLOAT, (n, blocks))]
        return [*found, ("zeros", _UINT8, (n, -(-blocks * self.bits // 8)))] if self.zero_points else found

    def nbytes(self, n: int, k: int) -> int:
        return sum(prod(shape) * (4 if kind == _FLOAT else 1) for _, kind, shape in self.tensors(n, k))

    def weights(self, n: int, k: int, rng: np.random.Generator) -> list[bytes]:
        """Random codes, and scales that keep what comes of them small; in the order of `tensors`."""
        return [
            np.full(shape, 0.01 / self.block, np.float32).tobytes() if kind == _FLOAT else rng.bytes(prod(shape))
            for _, kind, shape in self.tensors(n, k)
        ]


INT4 = Form("int4-b64-asym", 4, 64, zero_points=True)
INT4_128 = Form("int4-b128-asym", 4, 128, zero_points=True)
INT8 = Form("int8-b64", 8, 64)
NF4 = Form("nf4-b64", 4, 64, float4=True)


def expert_graph(form: Form, hidden: int, width: int) -> bytes:
    """y = down(silu(gate(x)) * up(x)) with gate and up in one product, as bundles have it; weights in `RECORD`."""
    weights, offset = b"", 0
    for name, n, k in _matrices(hidden, width):
        for part, kind, shape in form.tensors(n, k):
            nbytes = prod(shape) * (4 if kind == _FLOAT else 1)
            weights += _tensor(f"{name}_{part}", kind, shape, external=(offset, nbytes))
            offset += nbytes
    nodes = [
        _product(form, "x", "gate_up", "first", 2 * width, hidden),
        _node("Split", ["gate_up", "halves"], ["gate", "up"], axis=1),
        _node("Sigmoid", ["gate"], ["sigmoid"]),
        _node("Mul", ["gate", "sigmoid"], ["silu"]),
        _node("Mul", ["silu", "up"], ["gated"]),
        _product(form, "gated", "y", "second", hidden, width),
    ]
    halves = _tensor("halves", _INT64, (2,), data=np.array([width, width], np.int64).tobytes())
    return _model(nodes, weights + halves, hidden)


def expert_record(form: Form, hidden: int, width: int) -> bytes:
    """The weights of such an expert, as its graph wants them."""
    rng = np.random.default_rng(0)
    return b"".join(part for _, n, k in _matrices(hidden, width) for part in form.weights(n, k, rng))


def chain(form: Form, widths: Sequence[int]) -> tuple[bytes, int]:
    """A run of products from widths[0] to widths[1] and so on, its weights inside; and their bytes."""
    rng, nodes, weights, nbytes = np.random.default_rng(0), list[bytes](), b"", 0
    last = len(widths) - 2
    for number, (k, n) in enumerate(pairwise(widths)):
        name = f"m{number}"
        nodes.append(
            _product(form, f"x{number}" if number else "x", "y" if number == last else f"x{number + 1}", name, n, k)
        )
        for (part, kind, shape), data in zip(form.tensors(n, k), form.weights(n, k, rng), strict=True):
            weights += _tensor(f"{name}_{part}", kind, shape, data=data)
        nbytes += form.nbytes(n, k)
    return _model(nodes, weights, widths[0]), nbytes


def attention_graph(heads: int, size: int) -> bytes:
    """One token's attention: q, k, v, caches of keys and values in place, their lengths, to y and the caches."""
    inputs = ["q", "k", "v", "keys", "values", "last", "length"]
    node = _node("GroupQueryAttention", inputs, ["y", "keys_out", "values_out"], num_heads=heads, kv_num_heads=heads)
    row, cache = (1, 1, heads * size), (1, heads, "capacity", size)
    shapes = [row, row, row, cache, cache, (1,), ()]
    kinds = [_FLOAT] * 5 + [_INT32] * 2
    ports = b"".join(encoded(11, _port(*each)) for each in zip(inputs, kinds, shapes, strict=True))
    for name, shape in (("y", row), ("keys_out", cache), ("values_out", cache)):
        ports += encoded(12, _port(name, _FLOAT, shape))
    return _model_of(encoded(1, node) + encoded(2, "made_up") + ports)


def _matrices(hidden: int, width: int) -> list[tuple[str, int, int]]:
    return [("first", 2 * width, hidden), ("second", hidden, width)]


def _product(form: Form, source: str, result: str, name: str, n: int, k: int) -> bytes:
    inputs = [source, *(f"{name}_{part}" for part, _, _ in form.tensors(n, k))]
    if form.float4:
        return _node("MatMulBnb4", inputs, [result], K=k, N=n, block_size=form.block, quant_type=1)
    bits = {"bits": form.bits, "accuracy_level": 4}
    return _node("MatMulNBits", inputs, [result], K=k, N=n, block_size=form.block, **bits)


def _node(kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: int) -> bytes:
    parts = [*(encoded(1, name) for name in inputs), *(encoded(2, name) for name in outputs), encoded(4, kind)]
    parts += [
        encoded(5, encoded(1, name) + encoded(3, value) + encoded(20, _INT)) for name, value in attributes.items()
    ]
    return b"".join(parts + ([encoded(7, _MICROSOFT)] if kind in _OF_MICROSOFT else []))


def _tensor(
    name: str, kind: int, shape: Sequence[int], data: bytes | None = None, external: tuple[int, int] = (0, 0)
) -> bytes:
    message = b"".join(encoded(1, size) for size in shape) + encoded(2, kind) + encoded(8, name)
    if data is not None:
        return encoded(5, message + encoded(9, data))
    entries = (("location", RECORD), ("offset", str(external[0])), ("length", str(external[1])))
    message += b"".join(encoded(13, encoded(1, key) + encoded(2, value)) for key, value in entries)
    return encoded(5, message + encoded(14, _EXTERNAL))


def _model(nodes: Sequence[bytes], initializers: bytes, width: int) -> bytes:
    """float32 [rows, width] to the same."""
    graph = b"".join(encoded(1, node) for node in nodes) + encoded(2, "made_up") + initializers
    x, y = (_port(name, _FLOAT, ("rows", width)) for name in "xy")
    return _model_of(graph + encoded(11, x) + encoded(12, y))


def _port(name: str, kind: int, shape: Sequence[int | str]) -> bytes:
    sizes = b"".join(encoded(1, encoded(2 if isinstance(size, str) else 1, size)) for size in shape)
    return encoded(1, name) + encoded(2, encoded(1, encoded(1, kind) + encoded(2, sizes)))


def _model_of(graph: bytes) -> bytes:
    opsets = [encoded(1, "") + encoded(2, 21), encoded(1, _MICROSOFT) + encoded(2, 1)]
    return encoded(1, 10) + encoded(7, graph) + b"".join(encoded(8, opset) for opset in opsets)
