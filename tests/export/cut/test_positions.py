"""Rotary tables by the length of the whole text: transformers' logits on both sides of the threshold and across it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort
import pytest
import torch

from pocketmoe.bundle.manifest import Inputs
from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import UnsupportedModel
from pocketmoe.export.convert import export_checkpoint
from pocketmoe.export.cut import positions
from pocketmoe.export.portable.portable import export_portable
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.options import EngineOptions
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers loading the tiny models

THRESHOLD, CHUNK = 40, 16
ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "short_factor": [1 + n / 10 for n in range(8)],
    "long_factor": [4.0 + 2 * n for n in range(8)],
    "original_max_position_embeddings": THRESHOLD,
}
MSCALES = {"phimoe": {"short_mscale": 1.1, "long_mscale": 1.3}}


def make(family: str) -> Any:
    rope = {**ROPE, **MSCALES.get(family, {})}
    return tiny.make_model(family, rope_parameters=rope, eos_token_id=None, pad_token_id=0)


@pytest.fixture(scope="module", params=["qwen3_moe", "phimoe"])
def model_and_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("longrope")
    model = make(request.param)
    bundle = export_checkpoint(tiny.save_checkpoint(root / "checkpoint", model), root / "bundle")
    return model, bundle


def prompt(length: int) -> list[int]:
    return np.random.default_rng(length).integers(3, tiny.VOCAB - 20, length).tolist()


def theirs(model: Any, ids: list[int], steps: int) -> tuple[list[int], np.ndarray]:
    """transformers' own generation: greedy tokens, and the logits that chose them."""
    text = torch.tensor([ids])
    out = model.generate(
        text,
        attention_mask=torch.ones_like(text),
        max_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, len(ids) :].tolist(), torch.cat(out.logits).numpy()


def ours(engine: Engine, ids: list[int], answer: list[int]) -> np.ndarray:
    engine.reset()
    return np.concatenate([engine.feed(ids), *(engine.feed([token]) for token in answer[:-1])])


@pytest.mark.parametrize(
    ("length", "steps"),
    [(THRESHOLD - 12, 6), (THRESHOLD, 1), (THRESHOLD + 1, 2), (3 * THRESHOLD, 4), (THRESHOLD - 5, 12)],
    ids=["below", "at", "just above", "above, in chunks of both sides", "an answer that crosses"],
)
def test_logits_are_those_of_transformers(model_and_bundle: Any, length: int, steps: int) -> None:
    """Of prompt and answer, in chunks of a prompt whose first ones lie below the threshold alone."""
    model, bundle = model_and_bundle
    answer, wanted = theirs(model, prompt(length), steps)
    with Engine(bundle, EngineOptions(capacity=length + steps, chunk=CHUNK)) as engine:
        found = ours(engine, prompt(length), answer)
    assert np.abs(found - wanted).max() < 1e-4


def test_the_cases_would_tell_the_tables_apart(model_and_bundle: Any) -> None:
    """A bundle that goes by the chunk, as older ones do, is far off; so is one that never computes anew."""
    model, bundle = model_and_bundle
    manifest = bundle.manifest
    length, steps = THRESHOLD - 5, 12
    answer, wanted = theirs(model, prompt(length), steps)
    keeping = msgspec.structs.replace(manifest.model, computed_anew_beyond=None)
    kept = Bundle(bundle.root, msgspec.structs.replace(manifest, model=keeping))
    with Engine(kept, EngineOptions(capacity=length + steps, chunk=CHUNK)) as engine:
        off = np.abs(ours(engine, prompt(length), answer) - wanted).max()
    assert (off > 1e-2) == (manifest.model.computed_anew_beyond is not None)
    long = torch.tensor([prompt(3 * THRESHOLD)])
    with torch.no_grad():
        whole = model(long).logits[0, :CHUNK]
        alone = model(long[:, :CHUNK]).logits[0]
    assert (whole - alone).abs().max() > 1e-2


def test_all_rows_of_a_text_that_is_computed_anew(model_and_bundle: Any) -> None:
    """Asked for every row of what is fed, one gets those, not those of what was there before."""
    _, bundle = model_and_bundle
    ids = prompt(THRESHOLD + 9)
    with Engine(bundle, EngineOptions(capacity=len(ids), chunk=CHUNK)) as engine:
        engine.feed(ids[: THRESHOLD - 3], rows="none")
        found = engine.feed(ids[THRESHOLD - 3 :], rows="all")
        assert found.shape == (12, tiny.VOCAB)
        assert engine.length == len(ids)
        engine.reset()
        if bundle.manifest.model.computed_anew_beyond:
            np.testing.assert_array_equal(found, engine.feed(ids, rows="all")[-12:])


def test_a_portable_model_goes_by_the_tokens_at_hand(model_and_bundle: Any, tmp_path: Path) -> None:
    """Which are the whole prompt: one input less to know of."""
    model, bundle = model_and_bundle
    portable = export_portable(bundle.root, tmp_path / "model.onnx")
    session = ort.InferenceSession(portable.model)
    manifest, ids = bundle.manifest, prompt(3 * THRESHOLD)
    feeds: dict[str, Any] = {
        manifest.inputs.token_ids: np.array([ids]),
        manifest.inputs.positions: np.arange(len(ids))[None],
        manifest.inputs.past_length: np.array([0]),
    }
    for state in manifest.states:
        shape = [0 if axis == state.growing_axis else size for axis, size in enumerate(state.shape)]
        feeds[state.input] = np.zeros(shape, state.dtype)
    assert {value.name for value in session.get_inputs()} <= set(feeds)
    (found,) = session.run([manifest.logits], {value.name: feeds[value.name] for value in session.get_inputs()})
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits.numpy()
    assert np.abs(np.asarray(found) - wanted).max() < 1e-4


def test_longrope_that_does_not_ask_for_the_last_position_is_refused() -> None:
    model = make("qwen3_moe")
    positions.check_inputs(model, Inputs(last_position="last_position"))
    with pytest.raises(UnsupportedModel, match="longrope"):
        positions.check_inputs(model, Inputs())
    positions.check_inputs(tiny.make_model("qwen3_moe"), Inputs())


def test_backend_and_threads_do_not_change_a_bit(model_and_bundle: Any) -> None:
    """All chunks are told the same end."""
    _, bundle = model_and_bundle
    found = []
    for threads, backend in itertools.product((1, 2), ("slots", "sessions")):
        options = EngineOptions(capacity=3 * THRESHOLD, chunk=CHUNK, threads=threads, backend=backend)  # type: ignore[arg-type]
        with Engine(bundle, options) as engine:
            found.append(engine.feed(prompt(3 * THRESHOLD), rows="all"))
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)
