"""A quantized bundle against the bundle it was made from."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from pocketmoe.bundle.manifest import DENSE, STORE, Manifest
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import ExpertId, StoreWriter
from pocketmoe.bundle.writer import BundleWriter
from pocketmoe.errors import BadInput, DamagedFile, GateFailed, OutputError
from pocketmoe.quantize import checks, experts
from pocketmoe.quantize.algorithms.formats import BlockFormat, QuantizedMatrix
from pocketmoe.quantize.apply import quantize_bundle
from pocketmoe.quantize.schemes import find_scheme
from tests.quantize import plain

TOKENS = [5, 300, 17, 42, 108, 301, 77, 9, 250, 33, 401, 12]
SCHEMES = ["int4", "int8"]
EXPERT_LIMIT = {"int4": 0.25, "int8": 0.04}  # of Gaussian weights and activations: twice what was measured for int8
TinyBundle = Callable[[str], Bundle]
Quantized = Callable[[str, str], Bundle]


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> str:
    return request.param


def all_experts(bundle: Bundle) -> Iterator[ExpertId]:
    for layer, moe in enumerate(bundle.manifest.moe_layers):
        for expert in range(moe.n_experts):
            yield ExpertId(layer, expert)


def off(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_every_byte_is_accounted_for(quantized: Quantized, scheme: str) -> None:
    assert list(quantized("olmoe", scheme).verify()) == []


def test_every_expert_is_close_and_none_is_skipped(tiny_bundle: TinyBundle, quantized: Quantized, scheme: str) -> None:
    before, after = tiny_bundle("olmoe"), quantized("olmoe", scheme)
    x = np.random.default_rng(1).standard_normal((5, before.manifest.model.hidden_size)).astype(np.float32)
    for expert in all_experts(before):
        truth = plain.run_expert(before, expert, x)
        assert 1e-4 < off(plain.run_expert(after, expert, x), truth) < EXPERT_LIMIT[scheme]


def test_logits_stay_close(tiny_bundle: TinyBundle, quantized: Quantized) -> None:
    truth, _ = plain.run(tiny_bundle("olmoe"), TOKENS)
    errors = {scheme: off(plain.run(quantized("olmoe", scheme), TOKENS)[0], truth) for scheme in SCHEMES}
    assert errors["int8"] < 0.15  # 0.058 measured: a random model's routes flip easily
    assert errors["int4"] < 0.3
    assert errors["int8"] < errors["int4"]


def test_int8_keeps_most_routes(tiny_bundle: TinyBundle, quantized: Quantized) -> None:
    """The first layer's routes depend on embedding and attention only, the later ones on everything before them."""
    _, truth = plain.run(tiny_bundle("olmoe"), TOKENS)
    _, found = plain.run(quantized("olmoe", "int8"), TOKENS)
    same = [np.mean([set(a) == set(b) for a, b in zip(t, f, strict=True)]) for t, f in zip(truth, found, strict=True)]
    assert np.mean(same) > 0.8


def test_graphs_hold_no_float_matrix_but_routers(quantized: Quantized, scheme: str) -> None:
    bundle = quantized("olmoe", scheme)
    for segment in bundle.manifest.segments[:-1]:
        ops = plain.op_types(bundle, segment.graph)
        assert ops.count("MatMulNBits") == 2  # packed qkv, o_proj
        assert ops.count("MatMul") == 1  # the router
        assert "GatherBlockQuantized" in ops or segment.graph != bundle.manifest.segments[0].graph
    assert plain.op_types(bundle, bundle.manifest.segments[-1].graph).count("MatMulNBits") == 1
    (kind,) = bundle.manifest.expert_kinds
    ops = plain.op_types(bundle, kind.graph)
    assert ops.count("MatMulNBits") == 2
    assert "MatMul" not in ops
    by_role = {(t.role, t.scheme == "fp32") for t in bundle.manifest.dense}
    assert by_role >= {("router", True), ("norm", True), ("attention", False), ("head", False), ("embedding", False)}
    assert not by_role & {("router", False), ("norm", False), ("attention", True), ("head", True)}


def test_sizes_shrink_as_planned(tiny_bundle: TinyBundle, quantized: Quantized, scheme: str) -> None:
    before, after = tiny_bundle("olmoe").manifest, quantized("olmoe", scheme).manifest
    expected_scheme = find_scheme(scheme)
    (kind,) = after.expert_kinds
    expected = [(tensor.shape[1], tensor.shape[0]) for tensor in before.expert_kinds[0].tensors]
    assert kind.nbytes == sum(expected_scheme.experts.fitted(k).nbytes(n, k) for n, k in expected)
    for role in ("attention", "head", "embedding"):
        form = expected_scheme.dense[role]
        shapes = [t.shape for t in before.dense if t.role == role]
        pairs = [s if role == "embedding" else s[::-1] for s in shapes]
        planned = sum(form.fitted(k).nbytes(n, k) for n, k in pairs)
        assert sum(t.nbytes for t in after.dense if t.role == role) == planned
    assert after.files[DENSE].nbytes < before.files[DENSE].nbytes / 2


def test_manifest_says_what_was_done(tiny_bundle: TinyBundle, quantized: Quantized, scheme: str) -> None:
    before, after = tiny_bundle("olmoe").manifest, quantized("olmoe", scheme).manifest
    assert {kind.scheme for kind in after.expert_kinds} == {find_scheme(scheme).experts.label}
    assert after.provenance.steps[:-1] == before.provenance.steps
    assert after.provenance.steps[-1].startswith(f"quantize {scheme}: experts int")
    assert set(after.provenance.tools) > set(before.provenance.tools)
    assert after.provenance.files == before.provenance.files
    assert set(after.files) == set(before.files)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3", "gpt_oss", "qwen3_moe"])
def test_other_architectures(tiny_bundle: TinyBundle, quantized: Quantized, model_type: str) -> None:
    """Shared experts; dense first layers and latent attention; biases within experts; a tied head."""
    before, after = tiny_bundle(model_type), quantized(model_type, "int8")
    truth, _ = plain.run(before, TOKENS)
    found, _ = plain.run(after, TOKENS)
    assert off(found, truth) < 0.15
    assert after.manifest.files[STORE].nbytes < before.manifest.files[STORE].nbytes
    x = np.random.default_rng(1).standard_normal((5, before.manifest.model.hidden_size)).astype(np.float32)
    expert = ExpertId(0, 3)
    assert off(plain.run_expert(after, expert, x), plain.run_expert(before, expert, x)) < EXPERT_LIMIT["int8"]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_tied_embedding_and_head_share_their_bytes(tiny_bundle: TinyBundle, quantized: Quantized, scheme: str) -> None:
    """Gathered and multiplied by in one format: no second copy, and no note of one."""
    before, after = tiny_bundle("qwen3_moe"), quantized("qwen3_moe", scheme)
    (table,) = [t for t in before.manifest.dense if t.role == "embedding"]
    found = [t for t in after.manifest.dense if t.role in ("embedding", "head")]
    assert [t.name for t in found] == [f"{table.name}.codes", f"{table.name}.scales"]
    assert "FusedMatMul" not in plain.op_types(after, after.manifest.segments[-1].graph)
    assert not after.manifest.notes


@pytest.mark.slow
def test_tied_embedding_and_head_of_two_formats(tiny_bundle: TinyBundle, tmp_path: Path) -> None:
    """Stored twice, which the notes say."""
    before = tiny_bundle("qwen3_moe")
    dense = {**find_scheme("int8").dense, "head": BlockFormat(4, 32, symmetric=False)}
    mixed = dataclasses.replace(find_scheme("int8"), dense=dense)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pocketmoe.quantize.apply.find_scheme", lambda _: mixed)
        after = quantize_bundle(before.root, tmp_path / "q", scheme="int8")
    assert len([t for t in after.manifest.dense if t.role in ("embedding", "head")]) == 5
    assert "stored twice, in int8-b64 and int4-b32-asym" in after.manifest.notes[0]
    assert off(plain.run(after, TOKENS)[0], plain.run(before, TOKENS)[0]) < 0.3


def test_workers_do_not_change_a_byte(tiny_bundle: TinyBundle, quantized: Quantized, tmp_path: Path) -> None:
    expected = contents(quantized("olmoe", "int4").root)
    for workers in (1, 2, 5):
        bundle = quantize_bundle(tiny_bundle("olmoe").root, tmp_path / "q", scheme="int4", workers=workers)
        assert contents(bundle.root) == expected


def test_source_is_untouched_and_progress_ends(tiny_bundle: TinyBundle, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_bundle("olmoe").root, tmp_path / "source")
    before = contents(source)
    seen: list[tuple[str, int, int]] = []
    quantize_bundle(source, tmp_path / "q", scheme="int4", progress=lambda *step: seen.append(step))
    assert contents(source) == before
    for what in ("quantizing dense weights", "quantizing experts", "hashing"):
        steps = [(done, total) for name, done, total in seen if name == what]
        assert steps[0][0] == 0
        assert steps[-1][0] == steps[-1][1] > 0


def test_unknown_scheme_names_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no quantization scheme is named 'awq'") as caught:
        quantize_bundle(tmp_path / "nothing", tmp_path / "q", scheme="awq")
    assert all(name in caught.value.remedy for name in ("int4", "int4-all", "int8"))


def test_quantized_source_is_refused(quantized: Quantized, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is quantized already"):
        quantize_bundle(quantized("olmoe", "int8").root, tmp_path / "q", scheme="int4")
    assert not list(tmp_path.iterdir())


def test_source_as_target_is_refused(tiny_bundle: TinyBundle, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_bundle("olmoe").root, tmp_path / "source")
    (tmp_path / "link").symlink_to(source)
    before = contents(source)
    for target in (source, tmp_path / "." / "source", tmp_path / "link"):
        with pytest.raises(BadInput):
            quantize_bundle(source, target, scheme="int4")
    assert contents(source) == before


def test_not_a_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not a PocketMoE bundle"):
        quantize_bundle(tmp_path, tmp_path / "q", scheme="int4")


@pytest.mark.parametrize("name", [STORE, DENSE, "graphs/expert_0.onnx", "graphs/segment_00.onnx"])
def test_damaged_source_is_refused_and_the_old_target_kept(
    tiny_bundle: TinyBundle, quantized: Quantized, tmp_path: Path, name: str
) -> None:
    source = shutil.copytree(tiny_bundle("olmoe").root, tmp_path / "source")
    target = shutil.copytree(quantized("olmoe", "int8").root, tmp_path / "target")
    kept = contents(target)
    data = bytearray((source / name).read_bytes())
    data[len(data) // 3] ^= 1
    (source / name).write_bytes(data)
    with pytest.raises(DamagedFile, match=name) as caught:
        quantize_bundle(source, target, scheme="int4")
    assert caught.value.exit_code == 3
    assert contents(target) == kept
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "target"]


@pytest.mark.parametrize("what", ["quantizing dense weights", "quantizing experts", "hashing"])
def test_interruption_leaves_nothing_behind(
    tiny_bundle: TinyBundle, quantized: Quantized, tmp_path: Path, what: str
) -> None:
    target = shutil.copytree(quantized("olmoe", "int8").root, tmp_path / "target")
    kept = contents(target)

    def interrupt(name: str, done: int, _total: int) -> None:
        if name == what and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_bundle(tiny_bundle("olmoe").root, target, scheme="int4", progress=interrupt)
    assert contents(target) == kept
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_full_disk_is_reported(tiny_bundle: TinyBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pocketmoe.quantize.apply.shutil.copyfile", full)
    with pytest.raises(OutputError, match="No space left"):
        quantize_bundle(tiny_bundle("olmoe").root, tmp_path / "q", scheme="int4")
    assert not list(tmp_path.iterdir())


def with_records(bundle: Bundle, target: Path, change: Callable[[ExpertId, np.ndarray], None]) -> Path:
    """A copy of a float32 bundle whose experts' records, as float32 arrays, were changed."""

    def manifest(root: Path) -> Manifest:
        with bundle.open_store() as store, StoreWriter(root / STORE) as writer:
            for expert, record in store.records.items():
                values = np.frombuffer(store.read(expert), np.float32).copy()
                change(expert, values)
                writer.append(expert, record.kind, values.tobytes())
            return msgspec.structs.replace(bundle.manifest, store_index_sha256=writer.close())

    with BundleWriter(target) as writer:
        shutil.copytree(bundle.root, writer.root, dirs_exist_ok=True)
        for stray in ("manifest.json", "packed"):
            shutil.rmtree(writer.root / stray, ignore_errors=True)
        (writer.root / "manifest.json").unlink(missing_ok=True)
        return writer.publish(manifest(writer.root)).root


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite_weight_is_named(tiny_bundle: TinyBundle, tmp_path: Path, value: float) -> None:
    def change(expert: ExpertId, values: np.ndarray) -> None:
        if expert == ExpertId(2, 5):
            values[-7] = value

    source = with_records(tiny_bundle("olmoe"), tmp_path / "source", change)
    with pytest.raises(BadInput, match="layer 2, expert 5, down_proj holds NaN or infinity") as caught:
        quantize_bundle(source, tmp_path / "q", scheme="int8")
    assert caught.value.exit_code == 3
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_zero_expert_stays_zero(tiny_bundle: TinyBundle, tmp_path: Path) -> None:
    """A pruned expert is no failure: its output was zero before."""

    def change(expert: ExpertId, values: np.ndarray) -> None:
        if expert == ExpertId(1, 1):
            values[:] = 0

    source = with_records(tiny_bundle("olmoe"), tmp_path / "source", change)
    bundle = quantize_bundle(source, tmp_path / "q", scheme="int4")
    assert not plain.run_expert(bundle, ExpertId(1, 1), np.ones((2, 128), np.float32)).any()


def test_outlier_expert_is_named(tiny_bundle: TinyBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tails so heavy that a block's largest weight leaves no codes for the others; Gaussian ones come to 0.09."""

    def change(expert: ExpertId, values: np.ndarray) -> None:
        if expert == ExpertId(3, 6):
            values[:] = np.random.default_rng(0).standard_t(3, len(values)) * 0.1

    monkeypatch.setitem(checks.MATRIX_LIMITS, 4, 0.1)
    source = with_records(tiny_bundle("olmoe"), tmp_path / "source", change)
    with pytest.raises(GateFailed, match=r"layer 3, expert 6, gate_up_proj: int4-.* changes it by 0\.1") as caught:
        quantize_bundle(source, tmp_path / "q", scheme="int4")
    assert caught.value.exit_code == 5
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_expert_turned_to_zeros_is_caught(
    tiny_bundle: TinyBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a broken kernel or quantizer would do it, where the matrices' own check does not see it."""
    real = experts.put

    def put(target: bytearray, packed: experts.Packed, matrix: QuantizedMatrix) -> None:
        matrix.scales[:] = 0
        real(target, packed, matrix)

    monkeypatch.setattr(experts, "put", put)
    with pytest.raises(GateFailed, match=r"layer 0, expert 0: quantized, its output is zero"):
        quantize_bundle(tiny_bundle("olmoe").root, tmp_path / "q", scheme="int8")


def test_skipped_weight_is_caught(tiny_bundle: TinyBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph whose node was not replaced although its weight was planned."""
    real = checks.load

    def load(path: Path) -> object:
        model = real(path)
        for node in list(model.graph):
            if node.op_type == "MatMulNBits" and "segment_02" in path.name:
                model.graph.remove(node)
                break
        return model

    monkeypatch.setattr(checks, "load", load)
    with pytest.raises(GateFailed, match="were planned"):
        quantize_bundle(tiny_bundle("olmoe").root, tmp_path / "q", scheme="int8")


def test_no_threads_are_left(tiny_bundle: TinyBundle, tmp_path: Path) -> None:
    before = threading.active_count()
    quantize_bundle(tiny_bundle("olmoe").root, tmp_path / "q", scheme="int8")
    assert threading.active_count() == before
