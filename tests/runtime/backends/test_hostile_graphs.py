"""Graphs that a stranger made: whatever they hold, hand over or ask for, one error names the graph.

Bundles are changed and sealed again, as an attacker can.
"""

# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportUnusedFunction=false

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from pocketmoe.bundle.manifest import STORE
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import PAGE, ExpertId
from pocketmoe.cli import main
from pocketmoe.errors import BadInput, BudgetTooSmall, DamagedFile, GraphRefused, OverBudget, PocketMoEError
from pocketmoe.ort import refusal
from pocketmoe.runtime.backends.graph_checks import read_graph
from pocketmoe.runtime.engine.cache_routing import preferring_segment
from pocketmoe.runtime.engine.claims import open_budget
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.memory_plan import Load, MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.memory import budget as budgets
from pocketmoe.runtime.sampling import Sampling, make_sampler
from pocketmoe.runtime.verification import verify
from tests import runnable
from tests.runnable import EXPERT, FLOAT, GRAPHS, INT64, ROUTER, SEGMENTS

PROMPT = [1, 2, 3, 4, 5]
Edit = Callable[[onnx.ModelProto], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runnable.write_bundle(tmp_path_factory.mktemp("runnable") / "bundle").root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """A bundle to change."""
    return shutil.copytree(whole, tmp_path / "bundle")


def logits_of(root: Path, **options: object) -> np.ndarray:
    """Logits of a prompt and two more tokens, float32 [3, vocab]."""
    chosen = {"backend": "sessions", "prefetch": "on", "capacity": 16, **options}
    with Engine(Bundle.open(root), EngineOptions(**chosen)) as engine:
        return np.concatenate([engine.feed(PROMPT), engine.feed([6]), engine.feed([7])])


def refusal_of(root: Path) -> PocketMoEError | None:
    """Why it does not run, which must be the file's fault or the memory's; None where it runs."""
    try:
        logits_of(root)
    except PocketMoEError as error:
        return error if error.exit_code in (3, 4) else pytest.fail(f"exit code {error.exit_code}: {error}")
    return None


def test_the_bundle_is_whole_and_computes_what_its_graphs_say(whole: Path) -> None:
    """Nothing to say by verify, and the logits that numpy finds: else the tests below would prove nothing."""
    assert list(verify(Bundle.open(whole))) == []
    x = runnable.weights(2, runnable.VOCAB, runnable.WIDTH)[[*PROMPT, 6, 7]]
    for layer in range(runnable.LAYERS):
        x = x + runnable.weights(3, runnable.WIDTH) if layer else x
        scores = x @ runnable.weights(1, runnable.WIDTH, runnable.EXPERTS)
        ids = np.argsort(-scores, axis=1)[:, : runnable.TOP_K]
        odds = np.exp(np.take_along_axis(scores, ids, axis=1))
        odds /= odds.sum(axis=1, keepdims=True)
        matrices = np.stack([runnable.weights(10 + runnable.EXPERTS * layer + e, 4, 4) for e in range(4)])
        x = np.einsum("tk,tkd->td", odds, np.einsum("ti,tkij->tkj", x, matrices[ids]))
    expected = x @ runnable.weights(4, runnable.WIDTH, runnable.VOCAB)
    for backend in ("sessions", "auto"):
        np.testing.assert_allclose(logits_of(whole, backend=backend), expected[4:], rtol=1e-4, atol=1e-4)


# Any change


def _rename_output(graph: onnx.ModelProto, n: int) -> None:
    port = graph.graph.output[n % len(graph.graph.output)]
    runnable.replace_value(graph, port.name, helper.make_node("Identity", ["own"], ["renamed"]))
    port.name = "renamed"


def _drop_output(graph: onnx.ModelProto, n: int) -> None:
    del graph.graph.output[n % len(graph.graph.output)]


def _drop_node(graph: onnx.ModelProto, n: int) -> None:
    del graph.graph.node[n % len(graph.graph.node)]


def _drop_initializer(graph: onnx.ModelProto, n: int) -> None:
    if graph.graph.initializer:
        del graph.graph.initializer[n % len(graph.graph.initializer)]


def _more_inputs(graph: onnx.ModelProto, n: int) -> None:
    graph.graph.input.append(runnable.port(f"more{n}", FLOAT, 1))


def _ports(graph: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    return [*graph.graph.input, *graph.graph.output]


def _retype(graph: onnx.ModelProto, n: int) -> None:
    ports = _ports(graph)
    ports[n % len(ports)].type.tensor_type.elem_type = (n * 7) % 24


def _rerank(graph: onnx.ModelProto, n: int) -> None:
    ports = _ports(graph)
    dims = ports[n % len(ports)].type.tensor_type.shape.dim
    if n % 3:
        dims.add().dim_value = 1 + n
    elif len(dims):
        del dims[0]


def _resize(graph: onnx.ModelProto, n: int) -> None:
    ports = _ports(graph)
    dims = ports[n % len(ports)].type.tensor_type.shape.dim
    if len(dims):
        dims[n % len(dims)].dim_value = [0, -1, 3, 2**31, 2**62][n % 5]


def _no_tensor(graph: onnx.ModelProto, n: int) -> None:
    ports = _ports(graph)
    ports[n % len(ports)].type.sequence_type.elem_type.tensor_type.elem_type = FLOAT


def _another_operator(graph: onnx.ModelProto, n: int) -> None:
    nodes = graph.graph.node
    nodes[n % len(nodes)].op_type = ["Relu", "Add", "Sum", "NoSuch", "Range", "NonZero", "StringNormalizer"][n % 7]


def _another_constant(graph: onnx.ModelProto, n: int) -> None:
    for initializer in graph.graph.initializer:
        if initializer.data_type == INT64:
            initializer.CopyFrom(numpy_helper.from_array(np.array([n - 5], np.int64), initializer.name))


STRUCTURE = [_rename_output, _drop_output, _drop_node, _drop_initializer, _more_inputs, _retype, _no_tensor]
OTHERS = [_rerank, _resize, _another_operator, _another_constant]


@given(name=st.sampled_from(GRAPHS), edit=st.sampled_from([*STRUCTURE, *OTHERS]), n=st.integers(0, 40))
@settings(max_examples=150, deadline=None)
def test_whatever_changes_in_a_graph_is_an_error_with_a_line(
    whole: Path, name: str, edit: Callable, n: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """It runs, or one error of ours says why not; and what verify passes is not refused for what it consists of."""
    root = tmp_path_factory.mktemp("changed") / "bundle"
    shutil.copytree(whole, root)
    runnable.change(root, name, lambda graph: edit(graph, n))
    faults = list(verify(Bundle.open(root)))
    error = refusal_of(root)
    if error:
        assert name in str(error) or edit in OTHERS, error
        assert faults or edit in OTHERS, error
    shutil.rmtree(root.parent)


@given(name=st.sampled_from(GRAPHS), share=st.floats(0, 1), bit=st.integers(0, 7), cut=st.booleans())
@settings(max_examples=150, deadline=None)
def test_whatever_bytes_a_graph_consists_of(
    whole: Path, name: str, share: float, bit: int, cut: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Cut short anywhere or with a bit flipped: it runs, or one error of ours says why not."""
    root = tmp_path_factory.mktemp("bytes") / "bundle"
    shutil.copytree(whole, root)
    data = bytearray((root / name).read_bytes())
    place = int(share * (len(data) - 1))
    data[place] ^= 1 << bit
    runnable.put(root, name, bytes(data[:place] if cut else data))
    list(verify(Bundle.open(root)))
    refusal_of(root)
    shutil.rmtree(root.parent)


# What graphs hand over


def _constant(value: str, number: float, dtype: type = np.int64) -> Edit:
    """Every element of a value becomes that number."""

    def edit(graph: onnx.ModelProto) -> None:
        nodes = [
            helper.make_node("Mul", ["own", "nought"], ["noughts"]),
            helper.make_node("Add", ["noughts", "it"], [value]),
        ]
        runnable.replace_value(graph, value, *nodes, nought=np.array(0, dtype), it=np.array(number, dtype))

    return edit


@pytest.mark.parametrize("number", [runnable.EXPERTS, 10**9, 2**40, -1, -(2**63)])
@pytest.mark.parametrize(("name", "value"), [(SEGMENTS[0], "ids0"), (SEGMENTS[1], "ids1"), (ROUTER, "expert_ids")])
def test_an_expert_that_there_is_not(root: Path, name: str, value: str, number: int) -> None:
    """It is refused before anything is counted, looked up or made room for by its number."""
    runnable.change(root, name, _constant(value, number))
    with pytest.raises(GraphRefused, match="expert") as caught:
        logits_of(root)
    assert caught.value.path == root / name


def test_an_expert_that_is_chosen_twice_counts_twice(root: Path) -> None:
    """In a prompt and in decode steps alike."""
    for layer in range(runnable.LAYERS):
        runnable.change(root, SEGMENTS[layer], _constant(f"ids{layer}", 2))
    found = logits_of(root)
    x = runnable.weights(2, runnable.VOCAB, runnable.WIDTH)[[5, 6, 7]] @ runnable.weights(12, 4, 4)
    x = (x + runnable.weights(3, runnable.WIDTH)) @ runnable.weights(16, 4, 4)
    np.testing.assert_allclose(found, x @ runnable.weights(4, 4, runnable.VOCAB), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "value", "shape"),
    [
        (SEGMENTS[0], "x0", [2, 4]),
        (SEGMENTS[0], "ids0", [1, 2]),
        (SEGMENTS[1], "w1", [1, 2]),
        (SEGMENTS[2], "logits", [1, 2, 8]),
        (SEGMENTS[0], "present", [1, 1, 4, 4]),
        (ROUTER, "expert_ids", [3, 2]),
    ],
)
def test_what_has_another_shape_than_it_must(root: Path, name: str, value: str, shape: list[int]) -> None:
    """What the file says of a value is one thing, what the graph then gives is another: the first that reads it tells.

    A prompt of 5 tokens gets as many rows as it has not.
    """
    cut = [
        helper.make_node("Slice", ["own", "from", "to"], ["part"]),
        helper.make_node("Expand", ["part", "shape"], [value]),
    ]
    constants = {
        "from": np.zeros(len(shape), np.int64),
        "to": np.ones(len(shape), np.int64),
        "shape": np.array(shape, np.int64),
    }

    def edit(graph: onnx.ModelProto) -> None:
        runnable.replace_value(graph, value, *cut, **constants)

    runnable.change(root, name, edit)
    if value == "present":  # of a state only the growth is its own affair
        assert logits_of(root).shape == (3, runnable.VOCAB)
        return
    with pytest.raises(DamagedFile) as caught:
        logits_of(root)
    assert str(caught.value.path).endswith(name)


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", ["0", "0.7"])
def test_logits_that_are_not_numbers(root: Path, number: float, temperature: str) -> None:
    """One line and exit 3, greedy or sampled."""
    runnable.change(root, SEGMENTS[2], _constant("logits", number, np.float32))
    found = CliRunner().invoke(main, ["run", str(root), "--prompt", "b c", "--temperature", temperature])
    assert found.exit_code == 3, found.output
    assert "the model's output is not a number" in found.stderr


def test_minus_infinity_only_rules_a_token_out() -> None:
    logits = np.array([-np.inf, 1.0, -np.inf], np.float32)
    assert [make_sampler(Sampling(temperature))(logits) for temperature in (0.0, 1.0)] == [1, 1]


# What graphs may hold


def _attribute(name: str, value: onnx.GraphProto) -> onnx.AttributeProto:
    return helper.make_attribute(name, value)


def _body(*nodes: onnx.NodeProto) -> onnx.GraphProto:
    return helper.make_graph(nodes, "body", [], [])


def _loop(graph: onnx.ModelProto) -> None:
    graph.graph.node.append(helper.make_node("Loop", ["", ""], ["v"], body=_body()))


def _scan_in_branch_in_scan(graph: onnx.ModelProto) -> None:
    scan = helper.make_node("Scan", ["x"], ["v"], body=_body(), num_scan_inputs=1)
    branch = helper.make_node("If", ["c"], ["v"], then_branch=_body(scan), else_branch=_body())
    graph.graph.node.append(helper.make_node("Scan", ["x"], ["v"], body=_body(branch), num_scan_inputs=1))


def _beam_search(graph: onnx.ModelProto) -> None:
    graph.graph.node.append(helper.make_node("BeamSearch", ["x"], ["v"], domain="com.microsoft", decoder=_body()))


def _foreign(graph: onnx.ModelProto) -> None:
    graph.graph.node.append(helper.make_node("Anything", ["x"], ["v"], domain="someone.else"))


def _function(graph: onnx.ModelProto) -> None:
    node = helper.make_node("Add", ["x", "x"], ["y"])
    graph.functions.append(helper.make_function("f", "F", ["x"], ["y"], [node], [helper.make_opsetid("", 20)]))


def _sparse(graph: onnx.ModelProto) -> None:
    values, places = (
        numpy_helper.from_array(np.ones(1, np.float32), "s"),
        numpy_helper.from_array(np.zeros(1, np.int64)),
    )
    graph.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [2**40]))


def _deep(graph: onnx.ModelProto) -> None:
    body = _body()
    for _ in range(10):
        body = _body(helper.make_node("If", ["c"], ["v"], then_branch=body, else_branch=_body()))
    graph.graph.node.extend(body.node)


def _many(graph: onnx.ModelProto) -> None:
    graph.graph.node.extend([helper.make_node("Neg", ["x"], ["v"])] * 20_001)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (_loop, "loops by Loop"),
        (_scan_in_branch_in_scan, "inside another loop"),
        (_beam_search, "loops by BeamSearch"),
        (_foreign, "someone.else"),
        (_function, "functions"),
        (_sparse, "sparse"),
        (_deep, "too deep"),
        (_many, "more than 20000 nodes"),
    ],
)
@pytest.mark.parametrize("name", [SEGMENTS[1], ROUTER, EXPERT])
def test_what_no_graph_may_hold(root: Path, name: str, edit: Edit, reason: str) -> None:
    """It is refused off the file, before ONNX Runtime sees it."""
    runnable.change(root, name, edit)
    with pytest.raises(DamagedFile, match=reason) as caught:
        logits_of(root)
    assert caught.value.path == root / name
    assert any(reason in fault for fault in verify(Bundle.open(root)))


def test_a_scan_over_tokens_is_no_harm(tmp_path: Path) -> None:
    """As linear attention has it; a branch too."""
    scan = helper.make_node("Scan", ["x"], ["y"], body=_body(), num_scan_inputs=1)
    branch = helper.make_node("If", ["c"], ["z"], then_branch=_body(scan), else_branch=_body(scan))
    path = tmp_path / "graph.onnx"
    path.write_bytes(runnable.model([branch, scan], [], []).SerializeToString())
    assert read_graph(path) == ({}, {})


def test_an_operator_that_is_named_twice_is_both(tmp_path: Path) -> None:
    """protobuf takes the last of a field that is there twice: hiding a Loop behind another name does not help."""
    loop = helper.make_node("Loop", [], ["v"], body=_body()).SerializeToString()
    node = b"\x22\x02If" + loop
    graph = b"\x0a" + bytes([len(node)]) + node
    path = tmp_path / "graph.onnx"
    path.write_bytes(b"\x3a" + bytes([len(graph)]) + graph)
    assert onnx.load(path).graph.node[0].op_type == "Loop"
    with pytest.raises(DamagedFile, match="Loop"):
        read_graph(path)


@given(data=st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_bytes_of_any_kind_are_read_or_refused(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.onnx"
    path.write_bytes(data)
    with pytest.raises(DamagedFile, match="is no graph of a bundle"):
        read_graph(path)


def test_what_onnx_runtime_says_need_not_be_text() -> None:
    """A name that is no UTF-8 comes out of pybind as UnicodeDecodeError, with the message in it."""
    try:
        b"Node (\xff) is bad".decode()
    except UnicodeDecodeError as error:
        said = refusal("graphs/x.onnx", error)
    assert isinstance(said, GraphRefused)
    assert "Node (" in said.one_line()
    assert isinstance(refusal("graphs/x.onnx", RuntimeError("std::bad_alloc")), OverBudget)


def test_a_node_whose_name_is_no_text(root: Path) -> None:
    """ONNX Runtime names the node when it fails: the error is one line all the same."""

    def edit(graph: onnx.ModelProto) -> None:
        graph.graph.node[0].name = "QQQQ"
        graph.graph.node[0].input[0] = "no such value"

    graph = runnable.graphs()[SEGMENTS[1]]
    edit(graph)
    runnable.put(root, SEGMENTS[1], graph.SerializeToString().replace(b"QQQQ", b"\xff\xfe\xfd\xfc"))
    with pytest.raises(GraphRefused) as caught:
        logits_of(root)
    assert caught.value.one_line().isprintable()


# Memory


def _ask(value: str, count: int, rows_from: str) -> Edit:
    """A value that needs `count` floats on the way, at run time."""

    def edit(graph: onnx.ModelProto) -> None:
        nodes = [
            helper.make_node("Shape", [rows_from], ["sizes"]),
            helper.make_node("ReduceMin", ["sizes"], ["size"], keepdims=1),
            helper.make_node("Min", ["size", "nought"], ["none"]),
            helper.make_node("Add", ["none", "count"], ["many"]),
            helper.make_node(
                "ConstantOfShape", ["many"], ["big"], value=numpy_helper.from_array(np.ones(1, np.float32))
            ),
            helper.make_node("ReduceMax", ["big"], ["most"], keepdims=0),
            helper.make_node("Mul", ["own", "most"], [value]),
        ]
        runnable.replace_value(graph, value, *nodes, nought=np.array([0], np.int64), count=np.array([count], np.int64))

    return edit


@pytest.mark.parametrize(
    ("name", "value", "source"),
    [(SEGMENTS[1], "x1", "y0"), (ROUTER, "expert_weights", "x"), (EXPERT, "y", "x")],
)
def test_a_graph_that_asks_for_more_than_the_budget_does_not_get_it(
    root: Path, name: str, value: str, source: str
) -> None:
    """It is named, exit 4; without the limit it runs. The limit is gone with the engine."""
    runnable.change(root, name, _ask(value, 3 * 10**7, source))
    assert logits_of(root).shape == (3, runnable.VOCAB)
    with pytest.raises(OverBudget, match=name):
        logits_of(root, memory=MemoryRequest.parse("100%"), capped=True)
    assert np.ones(3 * 10**7, np.float32).any()


@pytest.mark.parametrize("backend", ["sessions", "slots"])
def test_the_limit_leaves_what_the_budget_allows(whole: Path, backend: str) -> None:
    """A process may take what it was given: the same logits at the least and at all."""
    free = logits_of(whole, backend=backend)
    for memory in ("1%", "100%"):
        capped = logits_of(whole, backend=backend, memory=MemoryRequest.parse(memory), capped=True, threads=2)
        assert np.array_equal(capped, free)


def test_states_that_no_machine_holds(whole: Path) -> None:
    """A share of the experts has no total to be too small, but the machine has one."""
    bundle = Bundle.open(whole)
    huge = msgspec.structs.replace(bundle.manifest.states[0], shape=(2**31 - 1, 2**31 - 1, -1, 2**31 - 1))
    bundle.manifest = msgspec.structs.replace(bundle.manifest, states=(huge,))
    with pytest.raises(BudgetTooSmall):
        open_budget(MemoryRequest(expert_share=0.4), bundle.manifest, Load(16, 16))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the process had taken a terabyte."""
    monkeypatch.setattr(budgets.Budget, "peak_bytes", property(lambda _: 10**12))


@pytest.mark.usefixtures("taken")
def test_a_run_that_took_more_than_its_budget_says_so_and_fails(whole: Path) -> None:
    """After its result, which stands."""
    found = CliRunner().invoke(
        main, ["run", str(whole), "--prompt", "b c", "--memory", "50%", "--json", "--max-tokens", "3"]
    )
    assert found.exit_code == 4, found.output
    assert len(json.loads(found.stdout)["tokens"]) == 3
    assert "took 1000000.0 MB at its peak, its budget is" in found.stderr


@pytest.mark.usefixtures("taken")
def test_so_does_an_evaluation(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("b c d e f g h " * 3)
    call = ["eval", str(whole), "--text", str(tmp_path / "text.txt"), "--json", "--memory"]
    found = CliRunner().invoke(main, [*call, "3GB"])
    assert found.exit_code == 4, found.output
    assert json.loads(found.stdout)["seen"]["peak_memory_bytes"] == 10**12
    assert "at its peak" in found.stderr


@pytest.mark.usefixtures("taken")
def test_so_does_a_run_of_a_profile(whole: Path) -> None:
    order = {"bundle": str(whole), "prompt_tokens": 4, "output_tokens": 4, "expert_share": 0.5}
    found = CliRunner().invoke(main, ["measure", json.dumps(order)])
    assert found.exit_code == 4, found.output
    assert json.loads(found.stdout)["run"]["peak_memory_bytes"] == 10**12


# verify


def test_verify_looks_at_every_record(root: Path) -> None:
    """One whose hash in the store's index is wrong, though the store's own is right, is refused when it is paged in."""
    data = bytearray((root / STORE).read_bytes())
    data[PAGE * 3] ^= 1
    runnable.put(root, STORE, bytes(data))
    assert any("layer 0, expert 3" in fault for fault in verify(Bundle.open(root)))
    with Bundle.open(root).open_store() as store, pytest.raises(DamagedFile, match="layer 0, expert 3"):
        store.read(ExpertId(0, 3))


@pytest.mark.parametrize(
    "nodes",
    [
        [helper.make_node("Cast", ["a"], ["ids1"]), helper.make_node("Identity", ["ids1"], ["a"])],  # round and round
        [helper.make_node("Cast", [], ["ids1"])],
        [helper.make_node("TopK", ["x1"], ["ids1"])],
        [helper.make_node("TopK", ["x1"], ["v", "ids1"])],
    ],
    ids=["cycle", "nothing", "one output", "one input"],
)
def test_a_choice_that_cannot_be_changed_is_refused_by_name(root: Path, nodes: list[onnx.NodeProto]) -> None:
    """Preferring what is in memory reads the graph before ONNX Runtime does."""

    def edit(graph: onnx.ModelProto) -> None:
        runnable.replace_value(graph, "ids1", *nodes)

    runnable.change(root, SEGMENTS[1], edit)
    with pytest.raises(BadInput, match="MoE layer 1 cannot prefer"):
        preferring_segment(root / SEGMENTS[1], 1, Bundle.open(root).manifest.moe_layers[1])


@pytest.mark.parametrize("command", [["quantize", "--scheme", "int4"], ["export-portable"]])
def test_what_reads_graphs_by_the_onnx_package_refuses_them_too(root: Path, command: list[str], tmp_path: Path) -> None:
    runnable.put(root, EXPERT, (root / EXPERT).read_bytes()[:100])
    found = CliRunner().invoke(main, [*command, str(root), "-o", str(tmp_path / "out.onnx")])
    assert found.exit_code == 3, found.output
    assert EXPERT in found.stderr
