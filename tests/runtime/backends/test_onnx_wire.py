"""What is read off a model, and changed, without onnx, against models that onnx wrote."""

from __future__ import annotations

import pytest

from pocketmoe.runtime.backends import probe
from pocketmoe.runtime.backends.onnx_wire import accuracy_levels, external_spans, with_accuracy_level, with_offsets


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


def test_weights_moved_are_where_they_were_moved_to_and_nothing_else_changes() -> None:
    """By onnx's own reader; long enough numbers that lengths around them take more bytes than before."""
    onnx = pytest.importorskip("onnx")
    model = probe.GRAPH.read_bytes()
    moved = with_offsets(model, lambda offset: f"{offset + 7:0200d}")
    assert [span.offset for span in external_spans(moved)] == [span.offset + 7 for span in external_spans(model)]
    before, after = onnx.load_from_string(model), onnx.load_from_string(moved)
    for old, new in zip(before.graph.initializer, after.graph.initializer, strict=True):
        for entry, changed in zip(old.external_data, new.external_data, strict=True):
            if entry.key == "offset":
                assert changed.value == f"{int(entry.value) + 7:0200d}"
                changed.value = entry.value
    assert before == after


def test_accuracy_levels_can_be_changed() -> None:
    """Also in branches; nothing else of the model changes, and back again it is the same."""
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    product = helper.make_node("MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", accuracy_level=4, K=8)
    branch = helper.make_graph([product], "branch", [], [])
    choice = helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch)
    model = helper.make_model(helper.make_graph([product, choice], "graph", [], [])).SerializeToString()
    exact = with_accuracy_level(model, 0)
    assert (accuracy_levels(model), accuracy_levels(exact)) == ({4}, {0})
    assert with_accuracy_level(exact, 4) == model
    (found,) = [a.i for a in onnx.load_from_string(exact).graph.node[0].attribute if a.name == "K"]
    assert found == 8
