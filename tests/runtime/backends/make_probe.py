"""Makes pocketmoe/runtime/backends/probe.onnx, the expert that `doctor` swaps: python -m tests.runtime.make_probe."""

from __future__ import annotations

from math import prod

import onnx
from onnx import TensorProto, helper

from pocketmoe.runtime.backends.probe import GRAPH, HIDDEN

BLOCK = 32


def probe_model(hidden: int = HIDDEN) -> onnx.ModelProto:
    """y = down(silu(gate(x)) * up(x)), int4, every matrix [hidden, hidden]; the weights lie in a file named record."""
    nodes, weights, offset = [], [], 0
    for name, source in (("gate", "x"), ("up", "x"), ("down", "gated")):
        parts = (
            (f"{name}_codes", TensorProto.UINT8, (hidden, hidden // BLOCK, BLOCK // 2), 1),
            (f"{name}_scales", TensorProto.FLOAT, (hidden, hidden // BLOCK), 4),
        )
        for tensor, dtype, shape, itemsize in parts:
            weights.append(_external(tensor, dtype, shape, offset, prod(shape) * itemsize))
            offset += prod(shape) * itemsize
        output = "y" if name == "down" else name
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                [source, *(part[0] for part in parts)],
                [output],
                domain="com.microsoft",
                K=hidden,
                N=hidden,
                bits=4,
                block_size=BLOCK,
                accuracy_level=4,
            )
        )
    gated = [
        helper.make_node("Sigmoid", ["gate"], ["sigmoid"]),
        helper.make_node("Mul", ["gate", "sigmoid"], ["silu"]),
        helper.make_node("Mul", ["silu", "up"], ["gated"]),
    ]
    graph = helper.make_graph(
        [*nodes[:2], *gated, nodes[2]],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", hidden])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", hidden])],
        weights,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="pocketmoe")


def _external(name: str, dtype: int, shape: tuple[int, ...], offset: int, nbytes: int) -> TensorProto:
    tensor = TensorProto(name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "record"), ("offset", offset), ("length", nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


if __name__ == "__main__":
    GRAPH.write_bytes(probe_model().SerializeToString(deterministic=True))
