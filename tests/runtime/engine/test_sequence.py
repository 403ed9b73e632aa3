"""A text that begins as another goes on from there, whatever runs beside it, bit for bit as if computed anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pocketmoe.bundle.reader import Bundle
from pocketmoe.runtime.engine.engine import Engine, Feed
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.engine.segments import last_row
from pocketmoe.runtime.engine.sequence import Sequence, least_useful

KINDS = ["olmoe", "deepseek_v3", "gpt_oss"]  # attention in place, MLA, sliding window
RECURRENT = ["qwen3_next", "granitemoehybrid"]  # linear attention, Mamba
CHUNK, CAPACITY = 16, 90
ANSWER = [7, 8, 9]


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(2, 500, size=length).tolist()


def states(engine: Engine) -> dict[str, np.ndarray]:
    return {spec.input: engine.sequences[0].state(spec.input).copy() for spec in engine.bundle.manifest.states}


def anew(engine: Engine, text: list[int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    engine.reset()
    return engine.feed(text), states(engine)


@pytest.mark.parametrize("model_type", [*KINDS, *RECURRENT])
def test_a_reused_prefix_gives_the_same_bits(model_type: str, tiny_bundle: Callable[[str], Bundle]) -> None:
    """Logits and states are those of a text computed from its start, whatever was fed and decoded in between."""
    bundle = tiny_bundle(model_type)
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


class Alone:
    """What a text's logits are when nothing is beside it, by a place that only this uses."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: dict[tuple[int, int], np.ndarray] = {}

    def logits(self, number: int, answered: int) -> np.ndarray:
        """Those after text `number` and so many tokens of its answer, float32 [1, vocab]."""
        if (number, answered) not in self._known:
            self._engine.reset()
            self._known[number, 0] = self._engine.feed(TOGETHER[number])
            for index, token in enumerate(LONG_ANSWER, 1):
                self._known[number, index] = self._engine.feed([token])
        return self._known[number, answered]


BASE = prompt(4 * CHUNK, 20)
TOGETHER = [
    BASE[: 2 * CHUNK + 5],
    BASE[: 3 * CHUNK] + prompt(7, 21),
    BASE[: CHUNK + 3] + prompt(CHUNK, 22),
    prompt(9, 23),
    BASE,
]
LONG_ANSWER = [7, 8, 9, 10, 11]
SEQUENCES = 8


@dataclass
class Running:
    """A text at a place: which it is, what of it is still to be fed, and how much of its answer is."""

    number: int
    todo: list[int]
    answered: int = 0


class Place:
    """The texts of one engine while a test does this and that with them; the first is that of `Alone`."""

    def __init__(self, engine: Engine, alone: Alone) -> None:
        self.engine, self.alone = engine, alone
        self.running: dict[int, Running] = {}

    def start(self, place: int, number: int, way: str) -> None:
        """Text `number` at a place, from the longest beginning that any place has kept.

        It is copied as a cache on disk writes and reads it where `way` is refill.
        """
        self.running.pop(place, None)
        text, sequence, others = TOGETHER[number], self.engine.sequences[place], self.engine.sequences[1:]
        best = max(others, key=lambda other: other.reusable(text, len(text) - 1))
        kept = best.reusable(text, len(text) - 1)
        if way == "refill" and kept:
            refill(sequence, best, text[:kept])
        else:
            assert (sequence.truncate(kept) if best is sequence else sequence.fork(best, kept)) == kept
        assert sequence.tokens == text[:kept]
        self.running[place] = Running(number, sequence.to_feed(text[kept:]))

    def feeds(self, place: int, chunks: int) -> list[Feed]:
        """The next chunks of a place, or the next token of its answer."""
        run, sequence = self.running[place], self.engine.sequences[place]
        if not run.todo:
            return [Feed(sequence, [LONG_ANSWER[run.answered]], decoding=True)]
        starts = range(0, len(run.todo), CHUNK)[: chunks if sequence.layout.local else 1]
        last = sequence.length + len(run.todo) - 1
        return [Feed(sequence, run.todo[start : start + CHUNK], "last", last) for start in starts]

    def step(self, chunks: int, fails: bool) -> None:
        """All that run, so many chunks of their prompts; or the same with an error in the middle, and once more."""
        places = [place for place, run in self.running.items() if run.todo or run.answered < len(LONG_ANSWER)]
        plan = {place: self.feeds(place, chunks) for place in places}
        if not plan:
            return
        together = [feed for feeds in plan.values() for feed in feeds]
        if fails:
            self.engine.on_routes = _fail_in_the_second_layer
            with pytest.raises(ZeroDivisionError):
                self.engine.step(together)
            self.engine.on_routes = None
        logits = iter(self.engine.step(together))
        for place, feeds in plan.items():
            found = [next(logits) for _ in feeds][-1]
            run = self.running[place]
            if run.todo:
                del run.todo[: sum(len(feed.tokens) for feed in feeds)]
            else:
                run.answered += 1
            if not run.todo:
                assert np.array_equal(found, self.alone.logits(run.number, run.answered))


def refill(sequence: Sequence, source: Sequence, tokens: list[int]) -> None:
    """Have a text become another's beginning, through copies of its states."""
    specs = {spec.input: spec for spec in source.layout.states}
    kept = {name: array.copy() for name, array in source.kept_states(len(tokens)).items()}
    for name, array in sequence.refill(len(tokens)).items():
        axis = specs[name].growing_axis
        first = (slice(None),) * (axis or 0) + (slice(None if axis is None else len(tokens)),)
        array[first] = kept[name][first]
    sequence.refilled(tokens)


def _fail_in_the_second_layer(layer: int, _: np.ndarray) -> None:
    if layer == 1:
        raise ZeroDivisionError


@pytest.fixture(scope="module", params=[*KINDS, *RECURRENT])
def shared_place(
    request: pytest.FixtureRequest,
    tiny_bundle: Callable[[str], Bundle],
) -> Iterator[Place]:
    bundle = tiny_bundle(request.param)
    memory = MemoryRequest.parse("60%")
    options = EngineOptions(
        memory, CAPACITY, backend="sessions", reuses=True, chunk=CHUNK, sequences=SEQUENCES + 1, snapshots=2
    )
    with Engine(bundle, options) as engine:
        yield Place(engine, Alone(engine))


PLACES = st.integers(1, SEQUENCES)
ACTIONS = st.one_of(
    st.tuples(st.just("start"), PLACES, st.integers(0, len(TOGETHER) - 1), st.sampled_from(["fork", "refill"])),
    st.tuples(st.just("step"), st.integers(1, 3), st.booleans()),
    st.tuples(st.just("close"), PLACES),
)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(actions=st.lists(ACTIONS, min_size=4, max_size=16))
def test_texts_that_run_together_in_any_order_give_the_bits_they_give_alone(
    shared_place: Place, actions: list[tuple[Any, ...]]
) -> None:
    """Up to eight texts are started, forked, stepped together, failed, closed: each logit is that of its text alone."""
    shared_place.running.clear()
    for action, *arguments in [*actions, ("step", 3, False), ("step", 1, True)]:
        if action == "close":
            shared_place.running.pop(arguments[0], None)
        else:
            getattr(shared_place, action)(*arguments)


def test_eight_texts_at_once(shared_place: Place) -> None:
    """All places run to the end of their answers; then each of the texts goes on from what the others kept."""
    for _ in range(2):
        shared_place.running.clear()
        for place in range(1, SEQUENCES + 1):
            shared_place.start(place, place % len(TOGETHER), "fork")
        for _ in range(6):
            shared_place.step(2, fails=False)
    assert all(run.answered for run in shared_place.running.values())


@given(st.lists(st.integers(1, 200), min_size=2, max_size=40, unique=True))
def test_the_beginnings_that_stay_are_spread(lengths: list[int]) -> None:
    """However a text grows, the last stays, and no gap between those that stay is wider than twice an even share."""
    kept: list[int] = []
    for length in sorted(lengths):
        if len(kept) == 4:
            kept.remove(least_useful([*kept, length]))
        kept.append(length)
    assert kept == sorted(kept)
    assert kept[-1] == max(lengths)
    assert len(kept) == min(4, len(lengths))


def test_snapshots_of_a_growing_text_are_evenly_spread() -> None:
    """Of a text that grows chunk by chunk four stay, with gaps that differ by no more than a factor of four."""
    kept: list[int] = []
    for length in range(1, 65):
        if len(kept) == 4:
            kept.remove(least_useful([*kept, length]))
        kept.append(length)
        gaps = np.diff([0, *kept])
        assert len(kept) < 4 or gaps[:-1].max() <= length / 2 + 1


@pytest.mark.parametrize("shape", [(1, 4096), (3, 4096), (1, 1, 4096), (1, 3, 4096)])
def test_the_last_row_outlives_what_it_is_of(shape: tuple[int, ...]) -> None:
    """Texts that decode together have theirs side by side, where the memory of one was the next one's."""

    def row() -> ort.OrtValue:
        array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        return last_row(ort.OrtValue.ortvalue_from_numpy(array))

    kept = row()
    others = [np.full(shape, -1, np.float32) for _ in range(64)]
    assert np.array_equal(kept.numpy().ravel(), np.arange(np.prod(shape), dtype=np.float32)[-4096:])
    assert len(others) == 64
