"""int8 caches against attention in numpy with the same rounding, against float32, and against what must be refused."""

# pyright: reportArgumentType=false

from __future__ import annotations

import json
import shutil
import string
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from pocketmoe.bundle.inspection import inspect_bundle
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.writer import BundleWriter
from pocketmoe.errors import BadInput, DamagedFile
from pocketmoe.profiles.calibration.cache_ranges import CacheRanges, measure_cache_ranges
from pocketmoe.profiles.quality.quality import Slice
from pocketmoe.quantize.apply import quantize_bundle
from pocketmoe.quantize.graphs import caches
from pocketmoe.quantize.graphs.caches import CacheCalibration, find_caches, pair_bounds
from pocketmoe.runtime.backends.choice import BackendName
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.tokenizer import Text
from tests.test_cli import pocketmoe

TinyBundle = Callable[[str], Bundle]
CAPACITY = 256


def letters(seed: int) -> str:
    """Random text: a random model has no use for another kind, and clips what it was not calibrated for."""
    return "".join(np.random.default_rng(seed).choice([*string.printable], 4000))


TEXT = [Slice("text", letters(0))]


@pytest.fixture(scope="module")
def ranges(tiny_bundle: TinyBundle) -> CacheRanges:
    bundle = tiny_bundle("olmoe")
    return measure_cache_ranges(bundle, find_caches(bundle), TEXT)


@pytest.fixture(scope="module")
def int8(tiny_bundle: TinyBundle, ranges: CacheRanges, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle in float32 with caches in int8: the caches are all that differs."""
    target = tmp_path_factory.mktemp("caches") / "int8"
    calibration = CacheCalibration(ranges.ranges, ranges.source)
    return quantize_bundle(tiny_bundle("olmoe").root, target, scheme="keep", caches=calibration)


def logits(bundle: Bundle, memory: str = "100%", backend: BackendName = "sessions", threads: int = 1) -> np.ndarray:
    """Of a prompt of two chunks and four tokens after it."""
    with Engine(bundle, EngineOptions(MemoryRequest.parse(memory), CAPACITY, threads, backend)) as engine:
        prompt = Text(bundle).encode(letters(1))[:200]
        return np.concatenate(
            [engine.feed(prompt, rows="all"), *(engine.feed([t], rows="all") for t in (7, 300, 41, 9))]
        )


def attention_model(heads: int, kv_heads: int, size: int) -> ir.Model:
    """One GroupQueryAttention with float32 caches and rotary embedding, no bias: a segment in small."""
    inputs = [
        _value("q", [1, "s", heads * size]),
        _value("k", [1, "s", kv_heads * size]),
        _value("v", [1, "s", kv_heads * size]),
        _value("past_k", [1, kv_heads, "c", size]),
        _value("past_v", [1, kv_heads, "c", size]),
        _value("last", [1], ir.DataType.INT32),
        _value("total", [], ir.DataType.INT32),
    ]
    angles = np.arange(64)[:, None] / 100 ** (np.arange(size // 2) / (size // 2))
    tables = [ir.Value(name=n, const_value=ir.tensor(t.astype(np.float32), name=n)) for n, t in _tables(angles)]
    for table in tables:
        table.shape, table.dtype = ir.Shape(angles.shape), ir.DataType.FLOAT
    node = ir.Node(
        "com.microsoft",
        "GroupQueryAttention",
        [*inputs, *tables],
        [ir.AttrInt64("num_heads", heads), ir.AttrInt64("kv_num_heads", kv_heads), ir.AttrInt64("do_rotary", 1)],
        num_outputs=3,
    )
    for value, name in zip(node.outputs, ("y", "present_k", "present_v"), strict=True):
        value.name, value.type = name, ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        inputs, node.outputs, nodes=[node], initializers=tables, opset_imports={"": 20, "com.microsoft": 1}
    )
    return ir.Model(graph, ir_version=10)


def _tables(angles: np.ndarray) -> list[tuple[str, np.ndarray]]:
    return [("cos", np.cos(angles)), ("sin", np.sin(angles))]


def _value(name: str, shape: list[int | str], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def test_attention_is_that_of_numpy_with_the_same_rounding() -> None:
    """Output and caches of the rewritten graph, a prompt and then single tokens in one shared buffer, written out."""
    heads, kv_heads, size, capacity = 4, 2, 16, 40
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((30, n, size)).astype(np.float32) for n in (heads, kv_heads, kv_heads))
    model = attention_model(heads, kv_heads, size)
    ranges = {
        name: rng.uniform(1, 4, (kv_heads, size)).astype(np.float32) for name in ("past_k", "past_v")
    }  # some clip
    assert caches.rewrite(model, ranges) == {"past_k", "past_v"}
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    buffers = [ort.OrtValue.ortvalue_from_numpy(np.zeros((1, kv_heads, capacity, size), np.int8)) for _ in range(2)]
    found = []
    for start, stop in ((0, 17), (17, 18), (18, 30)):
        binding = session.io_binding()
        for name, array in (("q", q), ("k", k), ("v", v)):
            binding.bind_cpu_input(name, array[start:stop].reshape(1, stop - start, -1))
        binding.bind_cpu_input("last", np.array([stop - 1], np.int32))
        binding.bind_cpu_input("total", np.array(stop, np.int32))
        binding.bind_output("y")
        for name, buffer in zip(("k", "v"), buffers, strict=True):
            binding.bind_ortvalue_input(f"past_{name}", buffer)
            binding.bind_ortvalue_output(f"present_{name}", buffer)
        session.run_with_iobinding(binding)
        found.append(binding.get_outputs()[0].numpy()[0])
    angles = np.arange(30)[:, None, None] / 100 ** (np.arange(size // 2) / (size // 2))

    def turn(x: np.ndarray) -> np.ndarray:
        a, b = x[..., : size // 2], x[..., size // 2 :]
        return np.concatenate([a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)], -1)

    radius = np.sqrt(ranges["past_k"][:, :8] ** 2 + ranges["past_k"][:, 8:] ** 2)
    scale_k = 1.25 * np.concatenate([radius, radius], -1) / 127
    scale_v = 1.25 * ranges["past_v"] / 127
    codes = [np.clip(np.rint(x / s), -128, 127) for x, s in ((turn(k), scale_k), (v, scale_v))]
    for buffer, code in zip(buffers, codes, strict=True):
        difference = buffer.numpy()[0, :, :30].astype(int) - code.transpose(1, 0, 2)
        assert np.abs(difference).max() <= 1  # a tie may fall either way
        assert np.mean(difference != 0) < 0.01
    keys, values = (np.repeat(c * s, heads // kv_heads, axis=1) for c, s in zip(codes, (scale_k, scale_v), strict=True))
    scores = np.einsum("shd,thd->hst", turn(q), keys) / np.sqrt(size)
    scores[:, np.triu(np.ones((30, 30), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    wanted = np.einsum("hst,thd->shd", weights / weights.sum(-1, keepdims=True), values).reshape(30, -1)
    assert np.abs(np.concatenate(found) - wanted).max() < 0.01


def test_a_pair_keeps_its_radius_at_every_position() -> None:
    """Keys turned to any angle stay within the bound from those of any other; channels that do not turn keep theirs."""
    rng = np.random.default_rng(2)
    keys = rng.standard_normal((50, 1, 12))
    seen = np.abs(keys).max(0).astype(np.float32)
    for interleaved in (False, True):
        first, second = (slice(0, 8, 2), slice(1, 8, 2)) if interleaved else (slice(0, 4), slice(4, 8))
        bounds = pair_bounds(seen, 4, interleaved)
        assert np.array_equal(bounds[:, 8:], seen[:, 8:])
        for angle in np.linspace(0, np.pi, 20):
            a, b = keys[..., first], keys[..., second]
            assert (np.abs(a * np.cos(angle) - b * np.sin(angle)) <= bounds[:, first] + 1e-6).all()
            assert (np.abs(a * np.sin(angle) + b * np.cos(angle)) <= bounds[:, second] + 1e-6).all()


def test_logits_stay_close_to_float32(tiny_bundle: TinyBundle, int8: Bundle) -> None:
    """A prompt of two chunks and single tokens after it."""
    truth, found = logits(tiny_bundle("olmoe")), logits(int8)
    off = np.linalg.norm(found - truth, axis=1) / np.linalg.norm(truth, axis=1)
    assert 1e-4 < np.median(off) < 0.05  # 0.023 measured: a random model's routes flip easily
    assert np.mean(found.argmax(1) == truth.argmax(1)) > 0.93


def test_same_bits_at_every_budget_backend_and_thread_count(int8: Bundle) -> None:
    wanted = logits(int8)
    for memory, backend, threads in (("1%", "sessions", 2), ("100%", "slots", 2), ("30%", "slots", 1)):
        assert np.array_equal(logits(int8, memory, backend, threads), wanted), (memory, backend, threads)


def test_the_budget_promises_a_quarter(tiny_bundle: TinyBundle, int8: Bundle) -> None:
    """And inspect says so, with what the scales were made by."""
    claims = []
    for bundle in (tiny_bundle("olmoe"), int8):
        with Engine(bundle, EngineOptions(MemoryRequest.parse("1%"), CAPACITY, backend="sessions")) as engine:
            claims.append(engine.budget.claims["states"])
    assert claims[0] == 4 * claims[1] == 4 * 8 * 2 * 32 * CAPACITY  # 8 caches of 2 heads of 32
    before, after = inspect_bundle(tiny_bundle("olmoe")), inspect_bundle(int8)
    assert (before.schemes["caches"], after.schemes["caches"]) == ("float32", "int8")
    assert before.state_bytes_per_token == 4 * after.state_bytes_per_token == 4 * 8 * 2 * 32
    assert "caches int8 per channel: 8 of 8 states" in after.provenance["steps"][-1]


def test_all_else_stays_and_weights_may_be_quantized_already(
    tiny_bundle: TinyBundle, int8: Bundle, ranges: CacheRanges, tmp_path: Path
) -> None:
    """`keep` changes no file but the segments; caches after weights or both at once give the same graphs."""
    before, after = (b.manifest for b in (tiny_bundle("olmoe"), int8))
    changed = {name for name in before.files if before.files[name] != after.files[name]}
    assert changed == {"MODEL_CARD.md", *(segment.graph for segment in before.segments[:-1])}
    calibration = CacheCalibration(ranges.ranges, ranges.source)
    weights = quantize_bundle(tiny_bundle("olmoe").root, tmp_path / "int4", scheme="int4")
    after = quantize_bundle(weights.root, tmp_path / "after", scheme="keep", caches=calibration)
    at_once = quantize_bundle(tiny_bundle("olmoe").root, tmp_path / "at-once", scheme="int4", caches=calibration)
    assert after.manifest.files == at_once.manifest.files
    assert after.manifest.states == at_once.manifest.states


@pytest.mark.slow
def test_attention_of_another_kind_is_refused(tiny_bundle: TinyBundle, int8: Bundle) -> None:
    with pytest.raises(BadInput, match="not GroupQueryAttention"):
        find_caches(tiny_bundle("deepseek_v3"))
    with pytest.raises(BadInput, match="int8 already"):
        find_caches(int8)


def test_only_attention_whose_caches_nothing_else_reads(tiny_bundle: TinyBundle) -> None:
    """A hybrid's other states stay: one layer's keys that another node reads too are left alone, the rest is found."""
    model = attention_model(4, 2, 8)
    extra = ir.node("Identity", [model.graph.inputs[3]])
    model.graph.append(extra)
    ranges = {name: np.ones((2, 8), np.float32) for name in ("past_k", "past_v")}
    assert caches.rewrite(model, ranges) == set()
    names = find_caches(tiny_bundle("olmoe"))
    ones = {name: np.ones((2, 32), np.float32) for name in names[:2]}
    rewritten = [caches.rewrite(ir.load(path), ones) for path in _segments(tiny_bundle("olmoe"))]
    assert [len(found) for found in rewritten] == [2, 0, 0, 0, 0]


def _segments(bundle: Bundle) -> list[Path]:
    return [bundle.path(segment.graph) for segment in bundle.manifest.segments]


def test_bad_ranges_and_too_little_text_are_refused(
    tiny_bundle: TinyBundle, ranges: CacheRanges, tmp_path: Path
) -> None:
    bundle = tiny_bundle("olmoe")
    first = find_caches(bundle)[0]
    for wrong in (np.full((2, 32), np.nan, np.float32), np.ones((32,), np.float32)):
        calibration = CacheCalibration({**ranges.ranges, first: wrong}, "nothing")
        with pytest.raises(BadInput, match=first):
            quantize_bundle(bundle.root, tmp_path / "q", scheme="keep", caches=calibration)
    with pytest.raises(BadInput, match="too few to calibrate"):
        measure_cache_ranges(bundle, [first], [Slice("text", "Too short.")])
    with pytest.raises(BadInput, match="leaves the weights as they are"):
        quantize_bundle(bundle.root, tmp_path / "q", scheme="keep")
    assert not list(tmp_path.iterdir())


def hostile(bundle: Bundle, target: Path, dtype: str, change: Callable[[ir.Model], None]) -> Bundle:
    """A copy, sealed anew, whose states have another dtype and whose first segment was changed."""
    with BundleWriter(target) as writer:
        shutil.copytree(bundle.root, writer.root, dirs_exist_ok=True, ignore=shutil.ignore_patterns("packed"))
        (writer.root / "manifest.json").unlink()
        graph = writer.root / bundle.manifest.segments[0].graph
        model = ir.load(graph)
        change(model)
        graph.write_bytes(ir.to_proto(model).SerializeToString())
        states = tuple(msgspec.structs.replace(state, dtype=dtype) for state in bundle.manifest.states)
        return writer.publish(msgspec.structs.replace(bundle.manifest, states=states))


def test_caches_that_do_not_fit_the_graph_are_refused(tiny_bundle: TinyBundle, int8: Bundle, tmp_path: Path) -> None:
    """int8 in the manifest alone, float32 in the manifest alone, int8 in the graph without scales or with too few."""

    def attention(model: ir.Model) -> ir.Node:
        return next(node for node in model.graph if node.op_type == "GroupQueryAttention")

    def without_scales(model: ir.Model) -> None:
        attention(model).resize_inputs(11)

    def with_few(model: ir.Model) -> None:
        scales = attention(model).inputs[12]
        assert scales is not None
        scales.const_value, scales.shape = ir.tensor(np.ones(3, np.float32), name=scales.name), ir.Shape([3])

    cases = [
        (tiny_bundle("olmoe"), "int8", lambda _: None, "the manifest as"),
        (int8, "float32", lambda _: None, "the manifest as"),
        (int8, "int8", without_scales, "k_scale must be provided"),
        (int8, "int8", with_few, "k_scale shape mismatch"),
    ]
    for number, (source, dtype, change, words) in enumerate(cases):
        bundle = hostile(source, tmp_path / str(number), dtype, change)
        with pytest.raises(DamagedFile, match=words) as refused:  # noqa: SIM117
            with Engine(bundle, EngineOptions(MemoryRequest.parse("100%"), CAPACITY, backend="sessions")) as engine:
                engine.feed([5, 6, 7])
        assert "segment_00.onnx" in refused.value.one_line()


def test_the_command_line(tiny_bundle: TinyBundle, tmp_path: Path) -> None:
    """Calibrated, quantized, inspected and run; without a text, what is needed is said."""
    text = tmp_path / "text.txt"
    text.write_text(letters(0), encoding="utf-8", newline="")
    source, target = tiny_bundle("olmoe").root, tmp_path / "q"
    asked = ("quantize", source, "-o", target, "--scheme", "int8", "--kv", "int8")
    refused = pocketmoe(*asked)
    assert (refused.returncode, target.exists()) == (2, False)
    assert "--calibration TEXT" in refused.stderr
    done = pocketmoe(*asked, "--calibration", text)
    assert done.returncode == 0, done.stderr
    inspection = json.loads(pocketmoe("inspect", target, "--json").stdout)
    assert inspection["schemes"]["caches"] == "int8"
    run = pocketmoe("run", target, "--prompt", "once upon a", "--raw", "--max-tokens", "4", "--json", "--memory", "50%")
    assert json.loads(run.stdout)["generated_tokens"] > 0, run.stderr
    again = pocketmoe(
        "quantize", target, "-o", tmp_path / "r", "--scheme", "keep", "--kv", "int8", "--calibration", text
    )
    assert (again.returncode, len(again.stderr.strip().splitlines())) == (3, 1)
    assert "int8 already" in again.stderr
