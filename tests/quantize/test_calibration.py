"""Calibration: what reached which expert, against the graph run by hand; and what a bundle keeps of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.resume import resumable_work
from pocketmoe.bundle.store import ExpertId
from pocketmoe.calibration import CHANNELS, SUMMARY, Calibration, CalibrationSummary, calibrate_once
from pocketmoe.errors import DamagedFile
from pocketmoe.profiles.calibration.calibrate import calibrate, modest
from pocketmoe.profiles.calibration.reference_logits import ReferenceLogits
from pocketmoe.profiles.quality.quality import Slice, evaluate
from pocketmoe.quantize.apply import quantize_bundle
from pocketmoe.quantize.float_backend import FloatBackend
from pocketmoe.quantize.graphs.outputs import write_with_activations
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.tokenizer import Text
from tests.quantize import plain
from tests.quantize.graphs.test_caches import letters

TinyBundle = Callable[[str], Bundle]
SLICES = [Slice("a", letters(0)), Slice("b", letters(1))]


@pytest.fixture(scope="module")
def calibration(tiny_bundle: TinyBundle, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    scratch = tmp_path_factory.mktemp("calibration")
    copy = write_with_activations(tiny_bundle("olmoe"), scratch / "copy")
    return calibrate(copy.bundle, SLICES, scratch=scratch, activation_outputs=copy.outputs, tokens=2048)


def test_it_saw_what_the_model_routes(tiny_bundle: TinyBundle, calibration: Calibration) -> None:
    """The rows of the first window are those of the graph, run by hand."""
    bundle = tiny_bundle("olmoe")
    window = Text(bundle).encode(SLICES[0].text)[: bundle.manifest.model.context_length]
    _, routes = plain.run(bundle, window)
    for layer, ids in zip(calibration.layers, routes, strict=True):
        found = np.sort(layer.expert_ids[: len(window)], axis=1)
        assert (found == np.sort(ids, axis=1)).mean() > 0.999  # chunks may round otherwise
    assert len(calibration.layers[0].x) == calibration.tokens


def test_nothing_is_left_of_the_text_but_sums(
    tiny_bundle: TinyBundle, calibration: Calibration, tmp_path: Path
) -> None:
    """Counts, weights and mean squares of channels, and they are those of the samples; no file has the rows."""
    bundle = tiny_bundle("olmoe")
    quantized = quantize_bundle(bundle.root, tmp_path / "q", scheme="int4", calibration=calibration)
    summary = msgspec.json.decode(quantized.check_file(SUMMARY).read_bytes(), type=CalibrationSummary)
    assert summary.tokens == calibration.tokens
    assert summary.slices == ("a", "b")
    top_k = bundle.manifest.moe_layers[0].top_k
    assert all(sum(layer.tokens) == calibration.tokens * top_k for layer in summary.layers)
    squares = load_file(quantized.check_file(CHANNELS))
    expert = int(np.argmax(summary.layers[1].tokens))
    x = calibration.of(ExpertId(1, expert)).x
    np.testing.assert_allclose(squares["layer_01"][expert], np.square(x).mean(axis=0), rtol=1e-5)
    assert len(x) == summary.layers[1].tokens[expert]
    size = sum(entry.nbytes for name, entry in quantized.manifest.files.items() if "calibration" in name)
    assert size < calibration.layers[0].x.nbytes / 4


def test_every_dense_matrix_was_reached(tiny_bundle: TinyBundle, calibration: Calibration) -> None:
    """Fused operators must not hide a matrix from calibration (Model-Optimizer 1340)."""
    wanted = {t.name for t in tiny_bundle("olmoe").manifest.dense if t.role in ("attention", "head")}
    assert wanted <= set(calibration.dense)
    for name in wanted:
        found = calibration.dense[name]
        assert found.rows >= 512
        assert np.isfinite(found.matrix).all()
        assert (np.diagonal(found.matrix) > 0).all()


def test_layers_differ_in_what_their_errors_do(calibration: Calibration) -> None:
    factors = [layer.factor for layer in calibration.layers]
    assert all(factor > 0 for factor in factors)
    assert all(np.isfinite(factors))


def without(calibration: Calibration, unreached: ExpertId) -> Calibration:
    """The same, as if no token had chosen an expert."""
    layers = list(calibration.layers)
    sample = layers[unreached.layer]
    other = (unreached.expert + 1) % 8
    ids = np.where(sample.expert_ids == unreached.expert, other, sample.expert_ids)
    layers[unreached.layer] = type(sample)(sample.x, ids, sample.expert_weights, sample.factor)
    return Calibration(tuple(layers), calibration.dense, calibration.tokens, calibration.slices, "0" * 64)


def test_an_expert_that_no_token_chose_is_listed_and_quantized_all_the_same(
    tiny_bundle: TinyBundle, calibration: Calibration, tmp_path: Path
) -> None:
    """llama.cpp 9400: one such expert drops a whole tensor. llm-compressor 2826: it gets scales that are NaN."""
    bundle, missed = tiny_bundle("olmoe"), ExpertId(1, 3)
    quantized = quantize_bundle(bundle.root, tmp_path / "q", scheme="int4", calibration=without(calibration, missed))
    assert any("layer 1 expert 3" in note for note in quantized.manifest.notes)
    x = np.random.default_rng(1).standard_normal((5, bundle.manifest.model.hidden_size)).astype(np.float32)
    truth, found = plain.run_expert(bundle, missed, x), plain.run_expert(quantized, missed, x)
    assert 0 < np.linalg.norm(found - truth) < 0.25 * np.linalg.norm(truth)


def test_plain_buffers_calibrate_as_sessions_do(tiny_bundle: TinyBundle, tmp_path: Path) -> None:
    """Packed weights and plain ones round differently, and nothing else differs; budget and threads change nothing."""
    bundle = tiny_bundle("olmoe")
    truth = calibrate(bundle, SLICES, scratch=tmp_path, tokens=1024)
    found = calibrate(bundle, SLICES, scratch=tmp_path, tokens=1024, options=modest(bundle, FloatBackend))
    assert found.source == truth.source
    for ours, theirs in zip(found.layers, truth.layers, strict=True):
        same = (ours.expert_ids == theirs.expert_ids).all(axis=1)
        assert same.mean() > 0.999
        np.testing.assert_allclose(ours.x[same], theirs.x[same], rtol=1e-3, atol=1e-4)
        assert ours.factor == pytest.approx(theirs.factor, rel=0.01)
    few = EngineOptions(MemoryRequest(expert_share=0.1), threads=2, backend=FloatBackend)
    again = calibrate(bundle, SLICES, scratch=tmp_path, tokens=1024, options=few)
    for ours, theirs in zip(again.layers, found.layers, strict=True):
        np.testing.assert_array_equal(ours.x, theirs.x)


def test_plain_buffers_notice_damage(tiny_bundle: TinyBundle, tmp_path: Path) -> None:
    source = tiny_bundle("olmoe")
    shutil.copytree(source.root, tmp_path / "damaged")
    with open(tmp_path / "damaged/experts.bin", "r+b") as file:
        file.seek(4096)
        file.write(b"\0\1\2\3")
    bundle = Bundle.open(tmp_path / "damaged")
    with pytest.raises(DamagedFile, match="does not match its checksum"):
        calibrate(bundle, SLICES, scratch=tmp_path, tokens=512, options=modest(bundle, FloatBackend))


def test_reference_logits_find_what_an_evaluation_does(
    tiny_bundle: TinyBundle, quantized: Callable[[str, str], Bundle], tmp_path: Path
) -> None:
    bundle, variant = tiny_bundle("olmoe"), quantized("olmoe", "int4")
    truth = evaluate(variant, SLICES, reference=bundle, max_tokens=300).overall.divergence
    assert truth is not None
    reference = ReferenceLogits(bundle, SLICES, modest(bundle), scratch=tmp_path, tokens=300)
    assert reference.mean_kl(variant) == pytest.approx(truth.mean_kl_nats.value, rel=0.01)
    assert reference.mean_kl(bundle) == pytest.approx(0, abs=1e-9)
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_that_was_kept_is_the_same(calibration: Calibration, tmp_path: Path) -> None:
    with resumable_work(tmp_path / "out", "a plan") as work:
        made = calibrate_once(work, lambda: calibration)

        def never() -> Calibration:
            raise AssertionError("made again")

        again = calibrate_once(work, never)
        assert work.kept is not None
        assert work.kept.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []
    for found in (made, again):
        assert (found.source, found.slices) == (calibration.source, calibration.slices)
        for ours, theirs in zip(found.layers, calibration.layers, strict=True):
            assert ours.factor == theirs.factor
            for name in ("x", "expert_ids", "expert_weights"):
                np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        assert found.dense.keys() == calibration.dense.keys()
        for name, hessian in found.dense.items():
            assert hessian.rows == calibration.dense[name].rows
            np.testing.assert_array_equal(hessian.matrix, calibration.dense[name].matrix)
