"""Experts of every form go into slots, and give there what a session of their own gives, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from pocketmoe.bundle.manifest import MANIFEST, read_manifest, seal
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import ExpertId
from pocketmoe.runtime.backends.onnx_wire import with_integers_inline
from pocketmoe.runtime.backends.sessions import SessionBackend
from pocketmoe.runtime.backends.slots import open_slots
from tests import runnable

PLENTY = 1 << 40
Edit = Callable[[onnx.ModelProto], None]


def interleaved(model: onnx.ModelProto) -> None:
    """Gate and up interleaved, as gpt-oss has them: slices whose bounds ONNX Runtime wants to know beforehand."""
    graph = model.graph
    del graph.node[:]
    for number in (0, 1):
        bounds = [f"start{number}", "end", "axis", "step"]
        graph.node.append(helper.make_node("Slice", ["product", *bounds], [f"half{number}"]))
    graph.node.insert(0, helper.make_node("MatMul", ["x", "w"], ["product"]))
    graph.node.append(helper.make_node("Concat", ["half1", "half0"], ["y"], axis=1))
    constants = {"start0": 0, "start1": 1, "end": (1 << 63) - 1, "axis": 1, "step": 2}
    graph.initializer.extend(numpy_helper.from_array(np.array([n], np.int64), name) for name, n in constants.items())


def reshaped(model: onnx.ModelProto) -> None:
    """A shape that is known only to its graph."""
    graph = model.graph
    graph.node[0].output[:] = ["product"]
    graph.node.append(helper.make_node("Reshape", ["product", "pairs"], ["paired"]))
    graph.node.append(helper.make_node("ReduceSum", ["paired", "last"], ["summed"], keepdims=1))
    graph.node.append(helper.make_node("Add", ["paired", "summed"], ["added"]))
    graph.node.append(helper.make_node("Reshape", ["added", "rows"], ["y"]))
    for name, shape in {"pairs": [-1, 2, 2], "last": [2], "rows": [-1, runnable.WIDTH]}.items():
        graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), name))


@pytest.mark.parametrize("edit", [interleaved, reshaped])
@pytest.mark.parametrize("hidden_size", [runnable.WIDTH, 2 * runnable.WIDTH])
def test_slots_hold_experts_with_constants_and_narrow_ones(tmp_path: Path, edit: Edit, hidden_size: int) -> None:
    """Every expert, after another has been in its slot; also where the hidden states are wider than the experts."""
    root = runnable.write_bundle(tmp_path / "bundle").root
    runnable.change(root, runnable.EXPERT, edit)
    manifest = read_manifest(root / MANIFEST)
    wider = msgspec.structs.replace(manifest.model, hidden_size=hidden_size)
    (root / MANIFEST).write_bytes(seal(msgspec.structs.replace(manifest, model=wider)))
    bundle = Bundle.open(root)
    x = np.random.default_rng(0).standard_normal((3, runnable.WIDTH), np.float32)
    with bundle.open_store() as store:
        slots, sessions = open_slots(bundle, store, PLENTY), SessionBackend(bundle, store)
        slot, alone = slots.make_slot(0), sessions.make_slot(0)
        for expert in (ExpertId(0, 1), ExpertId(1, 3), ExpertId(0, 0)):
            slot.load(expert)
            alone.load(expert)
            assert np.array_equal(slot.run(x), alone.run(x))
            assert np.array_equal(slot.run(x[:1]), alone.run(x[:1]))
        slots.close()


def test_only_small_integers_come_into_the_model() -> None:
    """By onnx's own reader: their values are those of the data file, weights and large tables stay outside."""
    arrays = {
        "axes": np.array([-1, 5], np.int64),
        "shape": np.array([3], np.int32),
        "weights": np.ones((2, 3), np.float32),
        "codes": np.ones((2, 3), np.uint8),
        "table": np.arange(1000, dtype=np.int64),
    }
    data, initializers = b"", []
    for name, array in arrays.items():
        tensor = onnx.TensorProto(name=name, dims=array.shape, data_location=onnx.TensorProto.EXTERNAL)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        for key, value in {"location": "d", "offset": len(data), "length": array.nbytes}.items():
            tensor.external_data.add(key=key, value=str(value))
        initializers.append(tensor)
        data += array.tobytes()
    model = helper.make_model(helper.make_graph([], "g", [], [], initializers)).SerializeToString()
    inline = onnx.load_from_string(with_integers_inline(model, data))
    for name, tensor in ((tensor.name, tensor) for tensor in inline.graph.initializer):
        outside = tensor.data_location == onnx.TensorProto.EXTERNAL
        assert outside == (name not in ("axes", "shape"))
        if not outside:
            assert np.array_equal(numpy_helper.to_array(tensor), arrays[name])
    with pytest.raises(ValueError, match="beyond"):
        with_integers_inline(model, data[:8])
