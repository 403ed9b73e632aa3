"""Another budget while texts are computed: slots go back to the system and come again, and no bit changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import BadInput, BudgetTooSmall
from pocketmoe.runtime.backends.choice import BackendName
from pocketmoe.runtime.engine.claims import text_bytes
from pocketmoe.runtime.engine.engine import Engine, Feed, feeds_of
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from tests import runnable
from tests.runtime.backends.test_contract import pages

TEXTS, CAPACITY, CHUNK = 3, 40, 4
BACKENDS: list[BackendName] = ["slots", "sessions"]


def options(backend: BackendName, memory: str = "100%") -> EngineOptions:
    return EngineOptions(MemoryRequest.parse(memory), CAPACITY, 2, backend, sequences=TEXTS, chunk=CHUNK, capped=True)


@pytest.fixture(scope="module", params=BACKENDS)
def engines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Engine, Engine]]:
    """One that is going to be resized, and one that is not."""
    bundle = runnable.write_bundle(tmp_path_factory.mktemp("resizing") / "bundle")
    with Engine(bundle, options(request.param)) as engine, Engine(bundle, options(request.param)) as other:
        yield engine, other


def least_and_full(engine: Engine) -> tuple[int, int]:
    """The least budget, and one with room for every expert."""
    experts = engine.opened.experts
    slots = sum(count * engine.backend.slot_bytes(kind) for kind, count in experts.items())
    return engine.least_bytes, engine.least_bytes + slots + (1 << 20)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_texts_come_out_the_same(engines: tuple[Engine, Engine], data: st.DataObject) -> None:
    """Bit for bit, whatever the budget becomes between steps of several texts; what is promised stays within it."""
    for engine in engines:
        for sequence in engine.sequences:
            sequence.reset()
    resized, _ = engines
    least, full = least_and_full(resized)
    for _ in range(data.draw(st.integers(1, 12))):
        if data.draw(st.booleans()):
            total = data.draw(st.integers(least, full))
            resized.resize(total)
            budget, slots = resized.budget, resized.opened.slots
            assert budget.total_bytes == total >= budget.claimed_bytes
            assert (full - total > (1 << 20)) or slots == resized.opened.experts
            assert sum(int(layer.sum()) for layer in resized.activity().residents) <= sum(slots.values())
        chosen = data.draw(st.lists(st.integers(0, TEXTS - 1), min_size=1, unique=True))
        texts = {i: data.draw(st.lists(st.integers(0, runnable.VOCAB - 1), min_size=1, max_size=CHUNK)) for i in chosen}
        texts = {i: text for i, text in texts.items() if resized.sequences[i].length + len(text) <= CAPACITY}
        found, wanted = (engine.step(feeds_for(engine, texts)) for engine in engines)
        for rows, right in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(rows, right)


def feeds_for(engine: Engine, texts: dict[int, list[int]]) -> list[Feed]:
    return [feed for i, text in texts.items() for feed in feeds_of(engine.sequences[i], text, "all")]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """32 experts of 1 MB: what becomes of them shows in the process's memory."""
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(runnable, "WIDTH", 512)
        patch.setattr(runnable, "EXPERTS", 16)
        return runnable.write_bundle(tmp_path_factory.mktemp("large") / "bundle")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_system_has_the_memory_of_what_goes(large: Bundle, backend: BackendName) -> None:
    """Down to the least and up again, twice: memory falls by what slots had, and comes when experts are wanted."""
    with Engine(large, replace(options(backend), threads=1)) as engine:
        least, full = least_and_full(engine)
        tokens = [*range(runnable.VOCAB)] * 3
        wanted = engine.feed(tokens, rows="all")
        used = 2**20 * len(np.flatnonzero(engine.stats.expert_counts))
        assert used > 12 * 2**20
        for _ in range(2):
            before = pages()
            engine.resize(least)
            fallen = before - pages()
            assert 0.9 * (used - 2 * 2**20) <= fallen
            assert engine.budget.observe() <= least
            engine.reset()
            np.testing.assert_array_equal(engine.feed(tokens, rows="all"), wanted)
            assert before - pages() > 0.8 * (used - 2 * 2**20)
            engine.resize(full)
            engine.reset()
            np.testing.assert_array_equal(engine.feed(tokens, rows="all"), wanted)
            assert before - pages() < 0.2 * used
            misses = engine.stats.misses
            engine.reset()
            np.testing.assert_array_equal(engine.feed(tokens, rows="all"), wanted)
            assert engine.stats.misses == misses


@settings(max_examples=30, deadline=None)
@given(changes=st.lists(st.tuples(st.floats(0, 1), st.booleans(), st.integers(0, TEXTS - 1)), min_size=1, max_size=6))
def test_what_experts_do_not_need_keeps_more_texts(
    engines: tuple[Engine, Engine], changes: list[tuple[float, bool, int]]
) -> None:
    """As many as fit beside all experts, none without; idle and empty ones go first, within what is promised."""
    _, one = engines
    _, full = least_and_full(one)
    backend: BackendName = "slots" if one.opened.backend == "slots" else "sessions"
    opening = replace(options(backend), reuses=True)
    each = text_bytes(one.bundle.manifest, opening.load)
    opening = replace(opening, memory=MemoryRequest(total_bytes=full + (1 << 28)))
    with Engine(one.bundle, opening) as engine:
        _, full = least_and_full(engine)
        idle = [*engine.sequences]
        for share, used, n_taken in changes:
            if used:
                idle[0].start_chunk([1])
                idle[0].end_step()
                idle.append(idle.pop(0))
            taken = [idle.pop() for _ in range(n_taken)]
            before = [*idle]
            total = int(engine.least_bytes + share * (full + 20 * each - engine.least_bytes))
            engine.resize(total, idle=idle)
            more, left = len(engine.sequences) - TEXTS, engine.budget.remaining_bytes
            assert left >= 0
            assert more == 0 if engine.opened.slots != engine.opened.experts else more == 16 or left < each
            assert {*map(id, engine.sequences)} == {*map(id, idle), *map(id, taken)}
            gone = [text for text in before if text not in idle]
            assert all(there.tokens or not text.tokens for text in gone for there in before if there in idle)
            idle += taken


def test_less_than_the_least_is_refused_and_changes_nothing(engines: tuple[Engine, Engine]) -> None:
    """The error names what would do."""
    engine, _ = engines
    before = engine.budget.total_bytes, engine.opened
    with pytest.raises(BudgetTooSmall) as refused:
        engine.resize(engine.least_bytes - 1)
    assert 0 <= refused.value.least_bytes - engine.least_bytes < 10**6  # in whole megabytes
    assert (engine.budget.total_bytes, engine.opened) == before


def test_what_is_kept_in_memory_is_what_was_chosen_most(tmp_path: Path) -> None:
    """Also where all experts were in memory, so that nothing had to be chosen so far."""
    with Engine(runnable.write_bundle(tmp_path / "bundle"), options("sessions")) as engine:
        for _ in range(10):
            engine.feed([3])
        often = {(layer, expert) for layer, expert in np.argwhere(engine.stats.expert_counts > 5).tolist()}
        engine.feed([0, 1, 2, 4, 5, 6, 7])
        slots = sum(engine.backend.slot_bytes(kind) for kind in engine.opened.experts)
        engine.resize(engine.least_bytes + (len(often) - 2) * slots)
        residents = engine.activity().residents
        there = {(layer, int(expert)) for layer in range(2) for expert in np.flatnonzero(residents[layer])}
        assert there == often


def test_an_engine_that_is_closed_is_not_resized(tmp_path: Path) -> None:
    """A model that is closed says so."""
    import pocketmoe

    model = pocketmoe.load(runnable.write_bundle(tmp_path / "bundle").root, memory="100%")
    model.close()
    with pytest.raises(BadInput, match="closed"):
        model.resize(1 << 40)
