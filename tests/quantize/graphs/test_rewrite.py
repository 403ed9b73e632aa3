"""The graph rewrite on small graphs: what is replaced, what is left, and that it computes the same."""

# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from pocketmoe.errors import DamagedFile
from pocketmoe.quantize.algorithms.choice import find_algorithm
from pocketmoe.quantize.algorithms.formats import BlockFormat, FloatFormat, dequantize
from pocketmoe.quantize.algorithms.nearest import quantize
from pocketmoe.quantize.graphs.rewrite import Packed, Use, externals, find_uses, load, pack_parts, rewrite
from tests.quantize import plain

RNG = np.random.default_rng(0)
MATMUL, BY_ROWS, GATHER = Use("matmul", False), Use("matmul", True), Use("gather", True)


def write_graph(
    path: Path, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], inputs: dict[str, int], output: str = "y"
) -> bytes:
    """Write a graph whose weights are external in a file `record`; return that file's bytes."""
    record, initializers = b"", []
    for name, array in weights.items():
        tensor = TensorProto(name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype))
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": "record", "offset": len(record), "length": array.nbytes}.items():
            tensor.external_data.add(key=key, value=str(value))
        initializers.append(tensor)
        record += array.tobytes()
    ports = [helper.make_tensor_value_info(name, kind, None) for name, kind in inputs.items()]
    out = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", ports, out, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return record


def quantized_graph(
    path: Path, weights: dict[str, np.ndarray], form: BlockFormat
) -> tuple[bytes, bytes, dict[str, np.ndarray], int]:
    """The rewritten model, its record, the weights it stands for (float64), and the number of nodes replaced."""
    model = load(path)
    packed: dict[str, Packed] = {}
    kept: dict[str, int] = {}
    record, stands_for, offset = bytearray(), {name: w.astype(np.float64) for name, w in weights.items()}, 0
    uses = find_uses(model)
    for name, array in weights.items():
        use = uses.get(name)
        if use is None:
            kept[name] = offset
            record += array.tobytes()
        else:
            rows = array if use.by_rows else array.T
            packed[name] = pack_parts(name, form, use, *rows.shape, offset)
            matrix = quantize(rows, packed[name].form, name=name)
            for part, data in zip(packed[name].parts, matrix.parts, strict=True):
                record = record.ljust(part.offset, b"\0") + data.tobytes()[: part.nbytes]
            back = dequantize(matrix).astype(np.float64)
            stands_for[name] = back if use.by_rows else back.T
        record = record.ljust(-(-len(record) // 64) * 64, b"\0")
        offset = len(record)
    count = rewrite(model, packed, kept, "record", level=0)
    return ir.to_proto(model).SerializeToString(), bytes(record), stands_for, count


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


FORMS = [BlockFormat(4, 32), BlockFormat(4, 64, False), BlockFormat(8, 16), BlockFormat(8, 128, False)]


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.label)
def test_matmul_and_gemm(tmp_path: Path, form: BlockFormat) -> None:
    """Two layers: MatMul by [K, N] with an Add, then Gemm by [N, K] with its own bias; odd sizes."""
    weights = {"a": floats(50, 33), "bias": floats(33), "b": floats(17, 33), "c": floats(17)}
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["p"], "first"),
        helper.make_node("Add", ["p", "bias"], ["q"]),
        helper.make_node("Gemm", ["q", "b", "c"], ["y"], transB=1),
    ]
    write_graph(tmp_path / "g.onnx", nodes, weights, {"x": TensorProto.FLOAT})
    assert find_uses(load(tmp_path / "g.onnx")) == {"a": MATMUL, "b": BY_ROWS}
    model, record, w, count = quantized_graph(tmp_path / "g.onnx", weights, form)
    assert count == 2
    x = floats(3, 50)
    y = plain.session(model, record).run(None, {"x": x})[0]
    np.testing.assert_allclose(y, (x @ w["a"] + w["bias"]) @ w["b"].T + w["c"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [*FORMS, FloatFormat("nf4", 64)], ids=lambda f: f.label)
def test_a_matrix_for_each_head(tmp_path: Path, form: BlockFormat | FloatFormat) -> None:
    """Latent attention's: every head's own matrix is quantized by rows and multiplied by itself."""
    heads, k, n = 3, 64, 24
    weights = {"a": floats(heads, k, n)}
    write_graph(tmp_path / "g.onnx", [helper.make_node("MatMul", ["x", "a"], ["y"], "m")], weights, {})
    model = load(tmp_path / "g.onnx")
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, heads, "s", k]))
    model.graph.inputs.append(x)
    model.graph[0].replace_input_with(0, x)
    use = find_uses(model)["a"]
    assert use == Use("matmul", False, heads)
    packed = pack_parts("a", form, use, heads * n, k, 64)
    rows = weights["a"].swapaxes(1, 2).reshape(-1, k)
    matrix = find_algorithm("nearest")(rows, packed.form, name="a", hessian=None)
    record = bytearray()
    for part, data in zip(packed.parts, matrix.parts, strict=True):
        record = record.ljust(part.offset, b"\0") + data.tobytes()
    assert rewrite(model, {"a": packed}, {}, "record", level=0) == 1
    inputs = floats(1, heads, 5, k)
    y = plain.session(ir.to_proto(model).SerializeToString(), bytes(record)).run(None, {"x": inputs})[0]
    stands_for = dequantize(matrix).reshape(heads, n, k).swapaxes(1, 2)
    np.testing.assert_allclose(y, inputs @ stands_for, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", ["Gemm", "FusedMatMul"])
@pytest.mark.parametrize("by_rows", [0, 1])
def test_a_scaled_product(tmp_path: Path, op: str, by_rows: int) -> None:
    """Logits that a model divides by a number, which the exporter's fusion draws into the product with the head."""
    weights = {"a": floats(48, 33) if by_rows else floats(33, 48)}
    domain = "com.microsoft" if op == "FusedMatMul" else ""
    node = helper.make_node(op, ["x", "a"], ["y"], "head", domain=domain, alpha=0.25, transB=by_rows)
    write_graph(tmp_path / "g.onnx", [node], weights, {"x": TensorProto.FLOAT})
    model, record, w, count = quantized_graph(tmp_path / "g.onnx", weights, BlockFormat(8, 32))
    assert count == 1
    x = floats(3, 33)
    y = plain.session(model, record).run(None, {"x": x})[0]
    np.testing.assert_allclose(y, x @ (w["a"].T if by_rows else w["a"]) / 4, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.label)
def test_gather(tmp_path: Path, form: BlockFormat) -> None:
    """Rows of an embedding whose width (50) is no whole number of blocks."""
    weights = {"table": floats(301, 50)}
    write_graph(
        tmp_path / "g.onnx", [helper.make_node("Gather", ["table", "ids"], ["y"])], weights, {"ids": TensorProto.INT64}
    )
    assert find_uses(load(tmp_path / "g.onnx")) == {"table": GATHER}
    model, record, w, count = quantized_graph_of_rows(tmp_path / "g.onnx", weights["table"], form)
    ids = np.array([[0, 300, 7], [7, 1, 2]])
    assert count == 1
    np.testing.assert_allclose(plain.session(model, record).run(None, {"ids": ids})[0], w[ids], rtol=1e-5, atol=1e-6)


def quantized_graph_of_rows(path: Path, table: np.ndarray, form: BlockFormat) -> tuple[bytes, bytes, np.ndarray, int]:
    """`quantized_graph` for one gathered table: rows of codes are not padded to whole blocks."""
    model = load(path)
    packed = pack_parts("table", form, GATHER, *table.shape, 0)
    matrix = quantize(table, packed.form, name="table")
    codes = matrix.codes.reshape(len(table), -1)[:, : packed.parts[0].shape[1]]
    record = b""
    for part, data in zip(packed.parts, (codes, *matrix.parts[1:]), strict=True):
        assert data.nbytes == part.nbytes
        record = record.ljust(part.offset, b"\0") + data.tobytes()
    count = rewrite(model, {"table": packed}, {}, "record", level=0)
    return ir.to_proto(model).SerializeToString(), record, dequantize(matrix).astype(np.float64), count


def test_a_weight_used_twice_is_stored_once(tmp_path: Path) -> None:
    weights = {"a": floats(32, 32)}
    nodes = [helper.make_node("MatMul", ["x", "a"], ["p"]), helper.make_node("MatMul", ["p", "a"], ["y"])]
    write_graph(tmp_path / "g.onnx", nodes, weights, {"x": TensorProto.FLOAT})
    model, record, w, count = quantized_graph(tmp_path / "g.onnx", weights, BlockFormat(8, 32))
    assert count == 2
    x = floats(2, 32)
    np.testing.assert_allclose(
        plain.session(model, record).run(None, {"x": x})[0], x @ w["a"] @ w["a"], rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize(
    "nodes",
    {
        "left of MatMul": [helper.make_node("MatMul", ["a", "x"], ["y"])],
        "elementwise": [helper.make_node("Mul", ["x", "a"], ["y"])],
        "two kinds of use": [
            helper.make_node("MatMul", ["x", "a"], ["p"]),
            helper.make_node("Add", ["p", "a"], ["y"]),
        ],
        "gathered columns": [helper.make_node("Gather", ["a", "i"], ["y"], axis=1)],
        "scaled Gemm with a bias": [helper.make_node("Gemm", ["x", "a", "narrow"], ["y"], alpha=2.0)],
        "Gemm of a transposed input": [helper.make_node("Gemm", ["x", "a"], ["y"], transA=1)],
        "bias matrix": [helper.make_node("Gemm", ["x", "x", "a"], ["y"])],
        "another domain": [helper.make_node("MatMul", ["x", "a"], ["y"], domain="com.example")],
        "too narrow": [helper.make_node("MatMul", ["x", "narrow"], ["y"])],
        "a batch": [helper.make_node("MatMul", ["x", "batch"], ["y"])],
        "doubles": [helper.make_node("MatMul", ["x", "doubles"], ["y"])],
    }.values(),
)
def test_other_uses_are_left_alone(tmp_path: Path, nodes: list[onnx.NodeProto]) -> None:
    weights = {
        "a": floats(32, 32),
        "narrow": floats(32, 15),
        "batch": floats(2, 32, 32),
        "doubles": floats(32, 32).astype(np.float64),
    }
    write_graph(tmp_path / "g.onnx", nodes, weights, {"x": TensorProto.FLOAT, "i": TensorProto.INT64})
    assert find_uses(load(tmp_path / "g.onnx")) == {}


def test_use_in_a_subgraph_is_left_alone(tmp_path: Path) -> None:
    branches = [
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "a"], [out])],
            out,
            [],
            [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)],
        )
        for out in ("t", "e")
    ]
    node = helper.make_node("If", ["c"], ["y"], then_branch=branches[0], else_branch=branches[1])
    write_graph(tmp_path / "g.onnx", [node], {"a": floats(32, 32)}, {"x": TensorProto.FLOAT, "c": TensorProto.BOOL})
    assert find_uses(load(tmp_path / "g.onnx")) == {}


def test_kept_weights_move_and_the_output_keeps_its_name(tmp_path: Path) -> None:
    """A graph output that a replaced node makes; a weight of another type whose offset changes."""
    weights = {"a": floats(32, 32), "shift": floats(32)}
    nodes = [helper.make_node("Add", ["x", "shift"], ["p"]), helper.make_node("MatMul", ["p", "a"], ["logits"])]
    write_graph(tmp_path / "g.onnx", nodes, weights, {"x": TensorProto.FLOAT}, output="logits")
    model, record, w, _ = quantized_graph(tmp_path / "g.onnx", weights, BlockFormat(4, 32))
    (tmp_path / "q.onnx").write_bytes(model)
    places = {name: tensor.offset for name, tensor in externals(load(tmp_path / "q.onnx")).items()}
    assert set(places) == {"a.codes", "a.scales", "shift"}
    session = plain.session(model, record)
    assert [o.name for o in session.get_outputs()] == ["logits"]
    x = floats(2, 32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], (x + w["shift"]) @ w["a"], rtol=1e-4, atol=1e-4)


def test_garbage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"\xff\x00 no protobuf")
    with pytest.raises(DamagedFile, match="no ONNX graph"):
        load(tmp_path / "g.onnx")
