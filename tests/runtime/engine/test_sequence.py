"""A text that begins as the one before goes on from there, bit for bit as if it were computed anew."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest

from pocketmoe.bundle.reader import Bundle
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions

KINDS = ["olmoe", "deepseek_v3", "gpt_oss"]  # attention in place, MLA, sliding window
RECURRENT = ["qwen3_next", "granitemoehybrid"]  # linear attention, Mamba
CHUNK, CAPACITY = 16, 90
ANSWER = [7, 8, 9]


@pytest.fixture(scope="module")
def recurrent_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """recurrent_bundle(model_type): a tiny bundle of one of `RECURRENT`."""
    from pocketmoe.export.convert import export_checkpoint
    from tests import tiny
    from tests.export.architectures import tiny_config

    def make(model_type: str) -> Bundle:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work = tmp_path_factory.mktemp(model_type)
            checkpoint = tiny.save_checkpoint(work / "checkpoint", tiny.randomize(tiny_config(model_type)))
            return export_checkpoint(checkpoint, work / "bundle")

    return make


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(2, 500, size=length).tolist()


def states(engine: Engine) -> dict[str, np.ndarray]:
    return {spec.input: engine.sequences[0].state(spec.input).copy() for spec in engine.bundle.manifest.states}


def anew(engine: Engine, text: list[int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    engine.reset()
    return engine.feed(text), states(engine)


@pytest.mark.parametrize("model_type", [*KINDS, *RECURRENT])
def test_a_reused_prefix_gives_the_same_bits(
    model_type: str, tiny_bundle: Callable[[str], Bundle], recurrent_bundle: Callable[[str], Bundle]
) -> None:
    """Logits and states are those of a text computed from its start, whatever was fed and decoded in between."""
    bundle = (tiny_bundle if model_type in KINDS else recurrent_bundle)(model_type)
    first = prompt(2 * CHUNK + 6)
    texts = [
        first,
        first + ANSWER + prompt(9, 1),  # the next turn of a conversation
        first + ANSWER + prompt(9, 1) + ANSWER + prompt(CHUNK, 2),  # and the next
        first[: CHUNK + 7] + prompt(11, 3),  # another that begins like it
        first[: 2 * CHUNK],  # a whole number of chunks, of which the last is computed for its logits
        prompt(CHUNK + 9, 4),  # nothing in common
        first[:5],
    ]
    options = EngineOptions(MemoryRequest.parse("60%"), CAPACITY, backend="sessions", reuses=True, chunk=CHUNK)
    with Engine(bundle, options) as engine:
        expected = [anew(engine, text) for text in texts]
        engine.reset()
        kept = []
        for text, (logits, left) in zip(texts, expected, strict=True):
            held = engine.sequences[0]
            kept.append(held.truncate(held.reusable(text, len(text) - 1)))
            assert kept[-1] % CHUNK == 0
            assert held.tokens == text[: kept[-1]]
            assert np.array_equal(engine.feed(text[kept[-1] :]), logits)
            found = states(engine)
            assert all(np.array_equal(found[name], left[name]) for name in left)
            for token in ANSWER:
                engine.feed([token])
    assert kept[:3] == [0, 2 * CHUNK, 3 * CHUNK]
    assert kept[3:] == ([CHUNK, CHUNK, 0, 0] if model_type in KINDS else [0, 0, 0, 0])


def test_what_an_error_ended_is_taken_back(tiny_bundle: Callable[[str], Bundle]) -> None:
    """A prompt that is stopped on its way leaves a prefix that still gives the same bits."""
    text = prompt(10 * CHUNK + 3)

    class Enough(Exception):
        pass

    def stop(layer: int, ids: np.ndarray) -> None:
        if layer and engine.length >= 9 * CHUNK:
            raise Enough

    options = EngineOptions(MemoryRequest.parse("60%"), 200, backend="sessions", reuses=True, chunk=CHUNK)
    with Engine(tiny_bundle("olmoe"), options) as engine:
        expected, left = anew(engine, text)
        engine.reset()
        engine.on_routes = stop
        with pytest.raises(Enough):
            engine.feed(text)
        engine.on_routes = None
        kept = engine.sequences[0].truncate(len(text) - 1)
        assert CHUNK <= kept < len(text) - 1
        assert np.array_equal(engine.feed(text[kept:]), expected)
        assert all(np.array_equal(value, left[name]) for name, value in states(engine).items())
