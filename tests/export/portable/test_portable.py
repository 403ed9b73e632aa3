"""A portable model gives this package's tokens where this package is not; its untaken experts do not run."""

# pyright: reportArgumentType=false

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from pocketmoe.bundle.manifest import STORE
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import ExpertId, StoreReader, StoreWriter
from pocketmoe.bundle.writer import BundleWriter
from pocketmoe.errors import BadInput, DamagedFile, OutputError
from pocketmoe.export.convert import export_checkpoint
from pocketmoe.export.portable.portable import ExpertsOperator, Portable, export_portable
from pocketmoe.export.portable.qmoe import find_swiglu
from pocketmoe.quantize.apply import quantize_bundle
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.options import EngineOptions
from tests import tiny
from tests.export.alone import chosen, run_alone

PROMPT = [int(n) for n in np.random.default_rng(0).integers(3, 300, 17)]
COUNT = 9
MODELS: dict[str, dict[str, Any]] = {
    "olmoe": {},  # SwiGLU in halves
    # Biases, and a clamped gate by turns; two blocks a row, so that QMoE takes its zero points; a head that reads the
    # embedding's bytes in another shape, once they are quantized.
    "gpt_oss": {"hidden_size": 128, "intermediate_size": 128, "tie_word_embeddings": True},
    "qwen2_moe": {},  # shared experts
    "deepseek_v3": {},  # caches that segments want with room for the new tokens, a matrix for each head
}
MakeBundle = Callable[[str, str], Bundle]
MakePortable = Callable[[str, str, ExpertsOperator], Portable]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[[str], Bundle], tmp_path_factory: pytest.TempPathFactory) -> MakeBundle:
    """bundle(model_type, scheme): the tiny bundle, fp32, int8 or int4. Read only."""

    @cache
    def make(model_type: str, scheme: str) -> Bundle:
        if scheme != "fp32":
            return quantize_bundle(make(model_type, "fp32").root, tmp_path_factory.mktemp(scheme) / "b", scheme=scheme)
        if not MODELS[model_type]:
            return tiny_bundle(model_type)
        root = tmp_path_factory.mktemp(model_type)
        tiny.save_checkpoint(root / "checkpoint", tiny.make_model(model_type, **MODELS[model_type]))
        return export_checkpoint(root / "checkpoint", root / "bundle")

    return make


@pytest.fixture(scope="module")
def portable(bundle: MakeBundle, tmp_path_factory: pytest.TempPathFactory) -> MakePortable:
    """portable(model_type, scheme, experts): the portable model of that bundle. Read only."""

    @cache
    def make(model_type: str, scheme: str, experts: ExpertsOperator) -> Portable:
        target = tmp_path_factory.mktemp("portable") / "model.onnx"
        return export_portable(bundle(model_type, scheme).root, target, experts=experts)

    return make


def engine_logits(bundle: Bundle, count: int = COUNT) -> np.ndarray:
    """What `run_alone` returns, from the runtime."""
    with Engine(bundle, EngineOptions(capacity=64)) as engine:
        rows = [engine.feed(PROMPT, rows="all")]
        while len(rows) < count:
            rows.append(engine.feed([int(rows[-1][-1].argmax())]))
    return np.concatenate(rows)


def chosen_experts(bundle: Bundle) -> set[ExpertId]:
    """The experts that the prompt and its continuation are routed to."""
    found: set[ExpertId] = set()
    with Engine(bundle, EngineOptions(capacity=64)) as engine:
        engine.on_routes = lambda layer, ids: found.update(ExpertId(layer, int(e)) for e in ids.ravel())
        token = int(engine.feed(PROMPT)[-1].argmax())
        for _ in range(COUNT - 1):
            token = int(engine.feed([token])[-1].argmax())
    return found


@pytest.mark.filterwarnings("ignore")  # transformers on tiny models
@pytest.mark.parametrize("scheme", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("model_type", MODELS)
def test_the_runtimes_logits_bit_for_bit_where_this_package_is_not(
    model_type: str, scheme: str, bundle: MakeBundle, portable: MakePortable, tmp_path: Path
) -> None:
    """Prefill and decode in a process with onnxruntime and numpy alone; fp32 is also what transformers computes."""
    found = run_alone(portable(model_type, scheme, "if").model, [PROMPT], COUNT, tmp_path)
    np.testing.assert_array_equal(found, engine_logits(bundle(model_type, scheme)))
    if scheme == "fp32":
        import torch

        model = tiny.make_model(model_type, **MODELS[model_type])
        tokens = [*PROMPT, *chosen(found, COUNT)]
        with torch.no_grad():
            expected = model(torch.tensor([tokens[:-1]])).logits[0].numpy()
        np.testing.assert_allclose(found, expected, atol=1e-3)
        assert chosen(expected, COUNT) == tokens[-COUNT:]


@pytest.mark.parametrize(("model_type", "scheme"), [("olmoe", "int8"), ("gpt_oss", "int8"), ("gpt_oss", "int4")])
def test_qmoe_gives_the_runtimes_tokens(
    model_type: str, scheme: str, bundle: MakeBundle, portable: MakePortable, tmp_path: Path
) -> None:
    """Same weights and the same precision, summed in another order: the tokens are the same, the logits close."""
    written = portable(model_type, scheme, "qmoe")
    expected = engine_logits(bundle(model_type, scheme))
    assert written.experts == {"QMoE": len(bundle(model_type, scheme).manifest.moe_layers)}
    found = run_alone(written.model, [PROMPT], COUNT, tmp_path)
    assert chosen(found, COUNT) == chosen(expected, COUNT)
    off = np.abs(found - expected)
    assert np.median(off) < 1e-5 * np.abs(expected).max()
    assert off.max() < 0.02 * np.abs(expected).max()  # where rounding activations to 8 bits went the other way


@pytest.mark.parametrize("model_type", ["gpt_oss", "deepseek_v3"])
def test_a_prompt_in_pieces(model_type: str, portable: MakePortable, tmp_path: Path) -> None:
    """The states carry the text from one run to the next."""
    model = portable(model_type, "fp32", "if").model
    pieces = [PROMPT[:5], PROMPT[5:6], PROMPT[6:]]
    found, whole = run_alone(model, pieces, 1, tmp_path), run_alone(model, [PROMPT], 1, tmp_path)
    np.testing.assert_allclose(found, whole, atol=1e-4)


@pytest.mark.parametrize(("scheme", "experts"), [("fp32", "if"), ("int8", "if"), ("int8", "qmoe")])
def test_untaken_experts_do_not_run(scheme: str, experts: ExpertsOperator, bundle: MakeBundle, tmp_path: Path) -> None:
    """With NaN in the weights or scales of every expert that no token takes, not a bit changes; in one that is: NaN."""
    source = bundle("olmoe", scheme)
    taken = chosen_experts(source)
    manifest = source.manifest
    everyone = {ExpertId(i, e) for i, layer in enumerate(manifest.moe_layers) for e in range(layer.n_experts)}
    assert everyone - taken, "the prompt should leave some experts out"
    logits = []
    for name, poisoned in (("clean", set()), ("untaken", everyone - taken), ("taken", {min(taken)})):
        root = poison(source, tmp_path / name, poisoned)
        written = export_portable(root, tmp_path / f"{name}.onnx", experts=experts)
        logits.append(run_alone(written.model, [PROMPT], COUNT, tmp_path))
    clean, untaken, first = logits
    np.testing.assert_array_equal(untaken, clean)
    assert np.isfinite(clean).all()
    assert np.isnan(first).any()


def poison(source: Bundle, target: Path, experts: set[ExpertId]) -> Path:
    """The bundle with NaN in every float32 tensor of some experts."""
    with BundleWriter(target) as writer, source.open_store() as store:
        copy_all_but_store(source, writer.root)
        with StoreWriter(writer.root / STORE) as out:
            for expert, record in store.records.items():
                data = bytearray(store.read(expert))
                for tensor in source.manifest.expert_kinds[record.kind].tensors if expert in experts else ():
                    if tensor.dtype == "float32":
                        np.frombuffer(data, np.float32, tensor.nbytes // 4, tensor.offset)[:] = np.nan
                out.append(expert, record.kind, data)
            index = out.close()
        writer.publish(msgspec.structs.replace(source.manifest, store_index_sha256=index))
    return target


def copy_all_but_store(source: Bundle, root: Path) -> None:
    for name in source.manifest.files:
        if name != STORE:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path(name), root / name)


def test_experts_of_several_widths_in_one_layer(bundle: MakeBundle, tmp_path: Path) -> None:
    """Every other expert in int4, the rest in int8: each runs its own graph, as in the runtime."""
    wide, narrow = bundle("olmoe", "int8"), bundle("olmoe", "int4")
    kinds = (wide.manifest.expert_kinds[0], narrow.manifest.expert_kinds[0])
    with BundleWriter(tmp_path / "mixed") as writer, wide.open_store() as a, narrow.open_store() as b:
        copy_all_but_store(wide, writer.root)
        shutil.copyfile(narrow.path(kinds[1].graph), writer.root / "graphs/expert_1.onnx")
        with StoreWriter(writer.root / STORE) as out:
            for expert in a.records:
                out.append(expert, expert.expert % 2, (b if expert.expert % 2 else a).read(expert))
            index = out.close()
        both = (kinds[0], msgspec.structs.replace(kinds[1], graph="graphs/expert_1.onnx"))
        manifest = msgspec.structs.replace(wide.manifest, expert_kinds=both, store_index_sha256=index)
        mixed = writer.publish(manifest)
    written = export_portable(mixed.root, tmp_path / "model.onnx")
    found = run_alone(written.model, [PROMPT], COUNT, tmp_path)
    np.testing.assert_array_equal(found, engine_logits(mixed))
    with pytest.raises(BadInput, match="QMoE does not compute"):
        export_portable(mixed.root, tmp_path / "other.onnx", experts="qmoe")


def test_the_model_is_valid_and_says_where_it_comes_from(bundle: MakeBundle, portable: MakePortable) -> None:
    """onnx's full check, without a domain but ONNX's and ONNX Runtime's; provenance and interface in the metadata."""
    for experts in ("if", "qmoe"):
        written = portable("gpt_oss", "int4", experts)
        onnx.checker.check_model(written.model, full_check=True)
        model = onnx.load(written.model, load_external_data=False)
        assert {entry.domain for entry in model.opset_import} == {"", "com.microsoft"}
        said = {entry.key.removeprefix("pocketmoe."): entry.value for entry in model.metadata_props}
        manifest = bundle("gpt_oss", "int4").manifest
        assert said["licence"] == "apache-2.0"
        assert said["base_model"] == "someone/base"
        assert said["bundle_sha256"] == manifest.sha256
        assert json.loads(said["steps"]) == [*manifest.provenance.steps, "export-portable"]
        assert manifest.provenance.tools.items() <= json.loads(said["tools"]).items()
        assert json.loads(said["scheme"]) == [kind.scheme for kind in manifest.expert_kinds]
        assert set(json.loads(said["experts"])) == {{"if": "If", "qmoe": "QMoE"}[experts]}
        interface = json.loads(said["interface"])
        names = {value.name for value in model.graph.input}
        states = {state["input"] for state in interface["states"]}
        assert names == states | {name for name in interface["inputs"].values() if name}
        assert said["data_file"] == written.data.name
        assert written.data.stem.endswith(said["data_sha256"][:12])


def test_one_expert_in_memory_at_a_time(bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many experts there are, no more than two records are alive at once."""
    alive: set[int] = set()
    most = 0
    real = StoreReader.read

    def read(reader: StoreReader, expert: ExpertId) -> memoryview:
        nonlocal most
        view = real(reader, expert)
        key = id(view.obj)
        alive.add(key)
        most = max(most, len(alive))
        weakref.finalize(view.obj, alive.discard, key)
        return view

    monkeypatch.setattr(StoreReader, "read", read)
    for experts in ("if", "qmoe"):
        export_portable(bundle("olmoe", "int8").root, tmp_path / f"{experts}.onnx", experts=experts)
    assert 1 <= most <= 2


def test_a_model_is_replaced_whole_or_not_at_all(bundle: MakeBundle, tmp_path: Path) -> None:
    """An interrupted export leaves the old pair as it was; a finished one leaves the new pair and nothing else."""
    target = tmp_path / "model.onnx"
    old = export_portable(bundle("olmoe", "int8").root, target)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "hashing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_portable(bundle("olmoe", "int4").root, target, progress=interrupt)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    new = export_portable(bundle("olmoe", "int4").root, target)
    assert new.data != old.data
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", new.data.name}


def test_what_is_not_a_portable_model_is_not_replaced(bundle: MakeBundle, tmp_path: Path) -> None:
    """A foreign file, a foreign ONNX model, a directory, a link, and the bundle itself stay as they are."""
    source = bundle("olmoe", "int8").root
    (tmp_path / "text.onnx").write_text("pocketmoe, but no model")
    onnx.save(onnx.parser.parse_model('<ir_version: 10, opset_import: ["": 20]> g (float x) => (float y) {y = Abs(x)}'),
              tmp_path / "foreign.onnx")  # fmt: skip
    (tmp_path / "directory.onnx").mkdir()
    (tmp_path / "link.onnx").symlink_to(tmp_path / "text.onnx")
    names = {path.name for path in tmp_path.iterdir()}
    for name in names:
        with pytest.raises(OutputError, match=f"{name} exists"):
            export_portable(source, tmp_path / name)
    with pytest.raises(OutputError, match="inside the bundle"):
        export_portable(source, source / "graphs" / "model.onnx")
    assert {path.name for path in tmp_path.iterdir()} == names
    assert list(Bundle.open(source).verify()) == []


def test_a_damaged_expert_is_named_and_nothing_is_left(bundle: MakeBundle, tmp_path: Path) -> None:
    shutil.copytree(bundle("olmoe", "int8").root, tmp_path / "bundle", ignore=shutil.ignore_patterns("packed"))
    with open(tmp_path / "bundle" / STORE, "r+b") as file:
        file.seek(5)
        file.write(b"\xff\x00\xff")
    with pytest.raises(DamagedFile, match="layer 0, expert 0"):
        export_portable(tmp_path / "bundle", tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_the_command_says_what_it_wrote_or_why_not(bundle: MakeBundle, tmp_path: Path) -> None:
    """Exit 0 and the two files; 3 and one line for what is no bundle or no portable model."""
    command = [sys.executable, "-m", "pocketmoe.cli", "export-portable"]

    def run(*args: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *map(str, args)], capture_output=True, text=True, check=False)

    done = run(bundle("olmoe", "int8").root, "-o", tmp_path / "model.onnx", "--experts", "qmoe")
    assert done.returncode == 0, done.stderr
    assert "QMoE in 4 layers" in done.stderr
    assert done.stdout == ""
    for args, words in (
        ((tmp_path, "-o", tmp_path / "x.onnx"), "not a PocketMoE bundle"),
        ((bundle("olmoe", "int8").root, "-o", tmp_path), "no portable model"),
    ):
        done = run(*args)
        assert done.returncode == 3
        assert words in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


EXPERT = """
<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
expert (float[rows, 128] x, uint8[256, 2, 64] a, float[256, 2] sa, uint8[128, 2, 64] b, float[128, 2] sb)
    => (float[rows, 128] y)
<float limit = {2.5}>
{
    h = com.microsoft.MatMulNBits <K=128, N=256, bits=8, block_size=64, accuracy_level=4> (x, a, sa)
    first, second = Split <axis=1, num_outputs=2> (h)
    GATE
    y = com.microsoft.MatMulNBits <K=128, N=128, bits=8, block_size=64, accuracy_level=4> (z, b, sb)
}
"""
CLAMPED = """
    minus = Neg(limit)
    f = Min(first, limit)
    l = Clip(second, minus, limit)
    s = Sigmoid(f)
    g = Mul(f, s)
    z = Mul(g, l)
"""


@pytest.mark.parametrize(
    ("gate", "limit", "first_row"),
    [
        ("s = Sigmoid(first) g = Mul(first, s) z = Mul(g, second)", np.inf, 0),
        ("s = Sigmoid(second) g = Mul(second, s) z = Mul(g, first)", np.inf, 128),
        (CLAMPED, 2.5, 0),
        ("e = Gelu(first) z = Mul(e, second)", None, 0),
        ("s = Sigmoid(first) z = Mul(s, second)", None, 0),
    ],
    ids=["silu", "silu of the second half", "clamped", "gelu", "sigmoid alone"],
)
def test_a_gate_is_known_by_what_it_computes(gate: str, limit: float | None, first_row: int) -> None:
    """SwiGLU in any order and with any clamp is QMoE's; another activation is not."""
    expert = ir.serde.deserialize_model(onnx.parser.parse_model(EXPERT.replace("GATE", gate)))
    for value in list(expert.graph.inputs)[1:]:
        assert value.dtype is not None
        expert.graph.inputs.remove(value)
        value.const_value = ir.ExternalTensor("record", 0, 0, value.dtype, shape=value.shape, name=str(value.name))
        expert.graph.register_initializer(value)
    form = find_swiglu(expert)
    if limit is None:
        assert form is None
    else:
        assert form is not None
        assert (form.alpha, form.beta, form.limit, form.rows[0]) == (1, 0, limit, first_row)
