"""What is read off a model without onnx, against models that onnx wrote."""

from __future__ import annotations

import pytest

from pocketmoe.runtime.onnx_wire import accuracy_levels


def test_accuracy_levels() -> None:
    """Of nodes that say one and one that does not, in branches too; those of other operators do not count."""
    onnx = pytest.importorskip("onnx")
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT

    def product(**attributes: int) -> object:
        inputs = ["x", "codes", "scales"]
        return helper.make_node("MatMulNBits", inputs, ["y"], domain="com.microsoft", K=32, N=32, **attributes)

    def graph(*nodes: object) -> object:
        y = helper.make_tensor_value_info("y", floats, [1, 32])
        return helper.make_graph(nodes, "graph", [], [y])

    def levels(*nodes: object) -> set[int]:
        return accuracy_levels(helper.make_model(graph(*nodes)).SerializeToString())

    branches = helper.make_node(
        "If", ["c"], ["y"], then_branch=graph(product(accuracy_level=4)), else_branch=graph(product(bits=4))
    )
    other = helper.make_node("Other", ["x"], ["y"], domain="made.up", accuracy_level=1)
    assert levels(other) == set()
    assert levels(product(bits=8, accuracy_level=4, block_size=32), other) == {4}
    assert levels(branches) == {0, 4}
