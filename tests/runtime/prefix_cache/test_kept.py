"""A text whose beginning comes from disk, bit for bit as if it were computed anew: for every kind of state."""

# ruff: noqa: F811
# (fixtures of other modules)

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import pocketmoe
from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import BadInput, OutputError
from pocketmoe.runtime.conversation import Generation
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.model import LoadRequest, Model
from pocketmoe.runtime.prefix_cache.cache import PrefixCache
from pocketmoe.runtime.prefix_cache.folder import Folder
from pocketmoe.runtime.prefix_cache.kept import KeptPrefixes, PrefixCacheRequest
from pocketmoe.runtime.run import RunRequest, run_prompt
from tests.quantize.graphs.test_caches import int8, ranges  # noqa: F401  # pyright: ignore[reportUnusedImport]
from tests.runtime.engine.test_sequence import RECURRENT

CHUNK, CAPACITY, LARGE = 16, 90, 1 << 30
KINDS = ["olmoe", "int8", "deepseek_v3", "gpt_oss"]  # attention in place, in int8, MLA, sliding window


@pytest.fixture(scope="module")
def bundle_of(tiny_bundle: Callable[[str], Bundle], int8: Bundle) -> Callable[[str], Bundle]:
    return lambda kind: int8 if kind == "int8" else tiny_bundle(kind)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(2, 500, size=length).tolist()


@contextlib.contextmanager
def engine_and_cache(bundle: Bundle, path: Path) -> Generator[tuple[Engine, KeptPrefixes]]:
    options = EngineOptions(MemoryRequest.parse("60%"), CAPACITY, backend="sessions", reuses=True, chunk=CHUNK)
    cache = PrefixCache.of(Folder.make(path, LARGE), bundle.manifest, CHUNK, "TINY")
    with Engine(bundle, options) as engine, KeptPrefixes(cache, lambda *_: None) as kept:
        yield engine, kept


@pytest.mark.parametrize("kind", [*KINDS, *RECURRENT])
def test_from_disk_it_has_the_same_bits(kind: str, bundle_of: Callable[[str], Bundle], tmp_path: Path) -> None:
    """Logits and states, at the next turn of a conversation and of a text that parts from it; by another engine."""
    bundle, first = bundle_of(kind), prompt(2 * CHUNK + 6)
    turn = first + prompt(9, 1)
    other = first[: CHUNK + 3] + prompt(20, 2)
    names = [spec.input for spec in bundle.manifest.states]
    with engine_and_cache(bundle, tmp_path / "cache") as (engine, kept):
        (text,) = engine.sequences
        expected = {}
        for asked in (turn, other):
            text.reset()
            logits = engine.feed(asked)
            expected[len(asked)] = (logits, {name: text.state(name).copy() for name in names})
        text.reset()
        assert kept.restore(text, first, len(first) - 1, 0) == 0
        engine.feed(first)
        engine.feed([7])
        engine.feed([8])  # the answer
        kept.keep(text)
    with engine_and_cache(bundle, tmp_path / "cache") as (engine, kept):
        (text,) = engine.sequences
        for asked, shared in ((turn, 2 * CHUNK), (other, 0 if kind in RECURRENT else CHUNK), (turn, 2 * CHUNK)):
            text.reset()
            reused = kept.restore(text, asked, len(asked) - 1, 0)
            assert reused == shared
            assert text.tokens == asked[:shared]
            logits, states = expected[len(asked)]
            assert np.array_equal(engine.feed(asked[reused:]), logits)
            assert all(np.array_equal(text.state(name), states[name]) for name in names)
            assert kept.restore(text, asked, len(asked) - 1, shared) == 0  # no more than memory has
            kept.keep(text)


TALK = "once upon a time there was a fox " * 16


@pytest.fixture(scope="module")
def root(tiny_bundle: Callable[[str], Bundle]) -> Path:
    return tiny_bundle("olmoe").root


def test_a_model_goes_on_after_a_restart(root: Path, tmp_path: Path) -> None:
    """From Python: the same answer, its prompt but for the end not computed; `run` finds it, inexact routing not."""
    options = {"raw": True, "max_tokens": 4}

    def answer() -> Generation:
        with pocketmoe.load(root, memory="60%", prefix_cache=tmp_path / "cache", prefix_cache_size="1GB") as model:
            return model.generate(TALK, **options)  # type: ignore[arg-type]

    first, second = answer(), answer()
    assert first.tokens == second.tokens
    assert first.reused_tokens == 0
    assert second.reused_tokens == (first.prompt_tokens - 1) // 128 * 128 > 0
    assert second.peak_memory_bytes <= second.memory_budget_bytes
    kept = PrefixCacheRequest(tmp_path / "cache")
    request = RunRequest(TALK, raw=True, memory=MemoryRequest.parse("60%"), max_tokens=4, prefix_cache=kept)
    report = run_prompt(root, request, on_text=lambda *_: None)
    assert (report.reused_tokens, tuple(report.tokens)) == (second.reused_tokens, first.tokens)
    for inexact in ({"drop_cold": 0.5}, {"prefer_cached": 0.5}):
        with pytest.raises(BadInput, match="depends on the memory"):
            run_prompt(root, replace(request, **inexact), on_text=lambda *_: None)  # type: ignore[arg-type]
        with pytest.raises(BadInput, match="depends on the memory"):
            Model(root, LoadRequest(prefix_cache=kept, **inexact))  # type: ignore[arg-type]
    with pytest.raises((BadInput, OutputError), match="prefix cache"):
        pocketmoe.load(root, prefix_cache=root)
    with pytest.raises(BadInput, match="not a size"):
        pocketmoe.load(root, prefix_cache=tmp_path / "cache", prefix_cache_size="much")


def test_another_bundle_of_the_same_shape_shares_nothing(root: Path, int8: Bundle, tmp_path: Path) -> None:
    """Weights decide the bits: what one has kept is not found by the other."""
    for place in (root, int8.root):
        with pocketmoe.load(place, memory="60%", prefix_cache=tmp_path / "cache") as model:
            assert model.generate(TALK, raw=True, max_tokens=2).reused_tokens == 0


def test_a_cache_that_cannot_be_written_is_a_remark(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, not at each answer; answers come all the same, also where it vanishes meanwhile."""
    said: list[str] = []

    def progress(what: str, _done: int, total: int) -> None:
        if not total:
            said.append(what)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pocketmoe.load(root, memory="60%", prefix_cache=tmp_path / "cache", progress=progress) as model:
        monkeypatch.setattr("os.posix_fallocate", full)
        answers = [model.generate(TALK, raw=True, max_tokens=2).tokens for _ in range(3)]
        assert answers[0] == answers[1] == answers[2]
        assert len(said) == 1
        assert "keeps 0 of 128 tokens (No space left on device)" in said[0]
        monkeypatch.undo()
        shutil.rmtree(tmp_path / "cache")
        assert model.generate(TALK, raw=True, max_tokens=2).tokens == answers[0]
        assert len(said) == 2
    assert not (tmp_path / "cache").exists()


def test_texts_at_once_share_it(root: Path, tmp_path: Path) -> None:
    """Several sequences, each with its own text: all are kept, found after a restart, and their places go on."""
    texts = [f"{name} {TALK}" for name in ("anna", "bert", "carl", "dora", "ezra")]
    found: list[list[tuple[int, ...]]] = []
    for start in range(2):
        with pocketmoe.load(root, memory="80%", sequences=2, prefix_cache=tmp_path / "cache") as model:
            streams = [model.stream(text, raw=True, max_tokens=3) for text in texts]
            results = []
            for stream in streams:
                assert "".join(stream)
                results.append(stream.result)
            assert [result.reused_tokens > 0 for result in results] == [bool(start)] * 5
            with model.stream(texts[0], raw=True, max_tokens=3) as stopped:
                next(stopped)
            assert model.active == 0
            found.append([result.tokens for result in results])
    assert found[0] == found[1]
