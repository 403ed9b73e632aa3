"""Which experts ONNX Runtime's `QMoE` computes as they are, and how it wants their weights.

On CPU `QMoE` knows one gate, SwiGLU with gate and linear rows interleaved, and block-wise weights of one format for
both of an expert's matrices. Its layout is that of `MatMulNBits` stacked over the experts, so that a bundle's codes,
scales and zero points go in as they are, the rows of the first matrix in another order. What does not fit is not
converted: the caller runs it as it is (`conditional`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from pocketmoe.ort import Session, session_options

_PRECISIONS = {(4, 0), (4, 4), (8, 4)}  # bits, accuracy_level: QMoE rounds activations for 8 bits at any level
_PROBES = 4  # rows by which a gate is recognized


@dataclass(frozen=True)
class Product:
    """x W^T + b by MatMulNBits, W [n, k]; the rest are names of tensors in the expert's record."""

    bits: int
    block: int
    accuracy_level: int
    n: int
    k: int
    codes: str
    scales: str
    zero_points: str | None
    bias: str | None


@dataclass(frozen=True)
class SwiGlu:
    """An expert that `QMoE` computes: down(g * sigmoid(alpha * g) * (l + beta)), g and l clamped at `limit`.

    `rows`: int [2 * ffn], the rows of `up` in the order gate 0, linear 0, gate 1, linear 1, ...
    """

    up: Product
    down: Product
    alpha: float
    beta: float
    limit: float
    rows: np.ndarray


def find_swiglu(expert: ir.Model) -> SwiGlu | None:
    """The expert's form if `QMoE` computes it with the same weights and activations in the same precision."""
    graph = expert.graph
    nodes = [node for node in graph if node.op_type == "MatMulNBits"]
    if len(nodes) != 2 or nodes[0].inputs[0] is not graph.inputs[0]:
        return None
    (up, hidden), (down, output) = map(_product, nodes)
    activated = nodes[1].inputs[0]
    if output is not graph.outputs[0] or activated is None or not _fit(up, down):
        return None
    gate = ir.convenience.extract(graph, [hidden], [activated])
    if any(isinstance(value.const_value, ir.ExternalTensor) for value in gate.initializers.values()):
        return None  # a weight of the expert takes part in its gate
    for value in (*gate.inputs, *gate.outputs):
        value.dtype = ir.DataType.FLOAT
    found = _recognize(ir.Model(gate, ir_version=expert.ir_version), down.k)
    return found and SwiGlu(up, down, *found)


def _product(node: ir.Node) -> tuple[Product, ir.Value]:
    """A MatMulNBits with what is added to it, and the value that holds the sum."""
    a = node.attributes
    names = [None if value is None else str(value.name) for value in (*node.inputs[1:], *[None] * 5)]
    output, bias = node.outputs[0], names[4]
    uses = list(output.uses())
    if bias is None and len(uses) == 1 and uses[0].node.op_type == "Add":
        other = uses[0].node.inputs[1 - uses[0].idx]
        if other is not None and isinstance(other.const_value, ir.ExternalTensor):
            output, bias = uses[0].node.outputs[0], str(other.name)
    product = Product(
        bits=a.get_int("bits", 4),
        block=a.get_int("block_size", 0),
        accuracy_level=a.get_int("accuracy_level", 0),
        n=a.get_int("N", 0),
        k=a.get_int("K", 0),
        codes=names[0] or "",
        scales=names[1] or "",
        zero_points=names[2],
        bias=bias,
    )
    return product, output


def _fit(up: Product, down: Product) -> bool:
    """Both matrices have one format, in whole blocks, that `QMoE` runs by the kernels of `MatMulNBits`."""
    formats = {(p.bits, p.block, p.accuracy_level, p.zero_points is None, p.bias is None) for p in (up, down)}
    if len(formats) != 1 or up.n != 2 * down.k or up.k != down.n:
        return False
    for p in (up, down):
        whole = p.k % p.block == 0
        # Zero points of a single block a row have another layout, without those kernels; 8 bits have no other level.
        if not whole or (p.zero_points and p.k == p.block) or (p.bits, p.accuracy_level) not in _PRECISIONS:
            return False
    return True


def _recognize(gate: ir.Model, ffn: int) -> tuple[float, float, float, np.ndarray] | None:
    """alpha, beta, limit and the order of rows with which SwiGLU computes what the graph `gate` does.

    It is known by what it computes, on values small and large, not by how the exporter wrote it.
    """
    probe = np.random.default_rng(0).normal(0, 8, (_PROBES, 2 * ffn)).astype(np.float32)
    session = Session(ir.to_proto(gate).SerializeToString(), session_options(threads=0), "an expert's gate")
    (wanted, *_) = session.run(None, {str(gate.graph.inputs[0].name): probe})
    if wanted.shape != (_PROBES, ffn):
        return None
    scalars = set(_scalars(gate.graph))
    candidates = itertools.product({1.0} | scalars, {0.0} | scalars, {math.inf} | {abs(s) for s in scalars})
    for (alpha, beta, limit), rows in itertools.product(candidates, _orders(ffn)):
        if np.allclose(_swiglu(probe[:, rows], alpha, beta, limit), wanted, rtol=1e-4, atol=1e-4):
            return alpha, beta, limit, rows
    return None


def _scalars(graph: ir.Graph) -> Iterator[float]:
    """The constants of a gate that could be its parameters."""
    tensors: list[Any] = [value.const_value for value in graph.initializers.values()]
    tensors += [node.attributes["value"].as_tensor() for node in graph if node.op_type == "Constant"]
    for tensor in tensors:
        if tensor is not None and tensor.size == 1 and tensor.dtype.is_floating_point():
            yield float(tensor.numpy().item())


def _orders(ffn: int) -> Iterator[np.ndarray]:
    """Where a gate finds its gate and linear rows: in two halves or by turns, either of them first."""
    halves = np.arange(2 * ffn).reshape(2, ffn).T
    turns = np.arange(2 * ffn).reshape(ffn, 2)
    for pairs in (halves, halves[:, ::-1], turns, turns[:, ::-1]):
        yield pairs.ravel()


def _swiglu(interleaved: np.ndarray, alpha: float, beta: float, limit: float) -> np.ndarray:
    """The gate as ONNX Runtime documents it for `QMoE`; float32 [rows, 2 * ffn] to [rows, ffn]."""
    g = np.minimum(interleaved[:, 0::2], limit)
    linear = np.clip(interleaved[:, 1::2], -limit, limit)
    with np.errstate(over="ignore"):
        return g / (1 + np.exp(-alpha * g)) * (linear + beta)
