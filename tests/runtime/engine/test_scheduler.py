"""Callers of one engine: who is computed when, whose text goes on from where, and who fails alone."""

# pyright: reportArgumentType=false, reportPrivateUsage=false

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketmoe.bundle.manifest import Inputs
from pocketmoe.errors import BadInput, DamagedFile
from pocketmoe.runtime.engine.engine import Feed
from pocketmoe.runtime.engine.scheduler import Ask, Job, Scheduler, Work
from pocketmoe.runtime.engine.sequence import Layout, Sequence
from tests.hang import HANG_S

CHUNK, VOCAB, CAPACITY = 4, 97, 80
POISON = 96  # a token that no engine can compute


class FakeEngine:
    """Real texts without states; the logits name the next token, which depends on every token of the text."""

    def __init__(self, at_once: int = 2, chunks_together: int = 3, local: bool = True, more: int = 0) -> None:
        """`more`: texts beyond those that are computed at once."""
        layout = Layout(Inputs(), (), CAPACITY, CHUNK, local, keeps=True)
        self.sequences = [Sequence(layout) for _ in range(at_once + more)]
        self.at_once = at_once
        self.chunks_together = chunks_together
        self.steps: list[list[Feed]] = []
        self.computed = 0
        self.interrupt = False

    def step(self, feeds: list[Feed]) -> list[np.ndarray]:
        self.steps.append(feeds)
        touched = {id(feed.sequence): feed.sequence for feed in feeds}.values()
        assert len(touched) <= self.at_once
        found: list[np.ndarray] = []
        for sequence in touched:
            sequence.begin_step()
        try:
            for feed in feeds:
                feed.sequence.start_chunk(feed.tokens, feed.last)
                if POISON in feed.tokens:
                    raise DamagedFile("experts.bin", "is broken")
                if self.interrupt:
                    self.interrupt = False
                    raise KeyboardInterrupt
        except BaseException:
            for sequence in touched:
                sequence.roll_back()
            raise
        for sequence in touched:
            sequence.end_step()
        for feed in feeds:
            assert feed.last is None or len(feed.sequence.tokens) <= feed.last + 1
            self.computed += len(feed.tokens)
            rows = {"none": 0, "last": 1, "all": len(feed.tokens)}[feed.rows]
            found.append(np.eye(VOCAB, dtype=np.float32)[[following(feed.sequence.tokens)] * rows])
        return found


def following(tokens: list[int]) -> int:
    """The token after a text."""
    value = 7
    for token in tokens:
        value = (value * 31 + token) % (VOCAB - 1)
    return value


def alone(prompt: list[int], count: int) -> list[int]:
    """The answer to a prompt, by what is true of any engine."""
    text = list(prompt)
    for _ in range(count):
        text.append(following(text))
    return text[len(prompt) :]


def answering(prompt: list[int], count: int, into: list[int]) -> Work:
    """What a caller does that wants `count` tokens."""
    rows = yield Ask(prompt)
    while True:
        into.append(int(rows[-1].argmax()))
        if len(into) == count:
            return
        rows = yield Ask([into[-1]])


class Caller:
    """One that wants an answer, and takes it in whatever thread calls."""

    def __init__(self, scheduler: Scheduler, prompt: list[int], count: int) -> None:
        self.scheduler, self.prompt, self.count = scheduler, prompt, count
        self.tokens: list[int] = []
        self.job = Job(answering(prompt, count, self.tokens))
        scheduler.submit(self.job)

    def __iter__(self) -> Iterator[int]:
        while self.scheduler.advance(self.job):
            yield len(self.tokens)

    def finish(self) -> None:
        for _ in self:
            pass
        self.scheduler.keep(self.job)
        assert self.tokens == alone(self.prompt, self.count)


class FakePrefixes:
    """A disk that keeps nothing: it looks at a text for as long as writing it would take."""

    def __init__(self, before: Callable[[], None] = lambda: None) -> None:
        self.before = before

    def restore(self, sequence: Sequence, tokens: list[int], most: int, in_memory: int) -> int:
        return 0

    def keep(self, sequence: Sequence) -> None:
        tokens = [*sequence.tokens]
        self.before()
        assert sequence.tokens == tokens


def run_threads(callers: list[Caller]) -> list[BaseException | None]:
    """All at once, each in a thread of its own; what each raised."""
    raised: list[BaseException | None] = [None] * len(callers)

    def take(index: int) -> None:
        try:
            callers[index].finish()
        except BaseException as error:  # noqa: BLE001 - it is what is looked at
            raised[index] = error

    threads = [threading.Thread(target=take, args=(index,), daemon=True) for index in range(len(callers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
        assert not thread.is_alive()
    return raised


LONGER = st.builds(lambda start, length: [*range(start, start + length)], st.integers(0, 60), st.integers(1, 20))
TEXTS = st.lists(st.integers(0, VOCAB - 2), min_size=1, max_size=20)


@settings(max_examples=40, deadline=None)
@given(
    prompts=st.lists(st.tuples(TEXTS, st.integers(1, 12)), min_size=1, max_size=8),
    sequences=st.integers(1, 4),
    together=st.integers(1, 4),
    local=st.booleans(),
    keeps=st.booleans(),
    more=st.integers(0, 3),
)
def test_whoever_runs_beside_it_an_answer_is_what_it_is_alone(
    prompts: list[tuple[list[int], int]], sequences: int, together: int, local: bool, keeps: bool, more: int
) -> None:
    """Up to eight callers in threads, on one to four texts at once: the tokens of each, and never more at a step."""
    engine = FakeEngine(sequences, together, local, more)
    scheduler = Scheduler(engine, FakePrefixes() if keeps else None)
    callers = [Caller(scheduler, prompt, count) for prompt, count in prompts]
    assert run_threads(callers) == [None] * len(callers)
    assert (scheduler.active, scheduler.waiting) == (0, 0)
    for feeds in engine.steps:
        chunks = [feed for feed in feeds if not feed.decoding]
        assert len(chunks) <= (together if len(chunks) == len(feeds) else 1)
        answers = [id(feed.sequence) for feed in feeds if feed.decoding]
        assert len(answers) == len({*answers})
        if not local:
            assert len({id(feed.sequence) for feed in feeds}) == len(feeds)


@settings(max_examples=150, deadline=None)
@given(
    sequences=st.integers(1, 4),
    more=st.integers(0, 3),
    rounds=st.lists(
        st.lists(
            st.tuples(st.integers(0, 9), st.integers(0, 5), LONGER, st.integers(1, 6), st.booleans()),
            min_size=2,
            max_size=4,
        ),
        min_size=3,
        max_size=6,
    ),
)
def test_texts_that_begin_as_others_come_out_as_if_alone(
    sequences: int, more: int, rounds: list[list[tuple[int, int, list[int], int, bool]]]
) -> None:
    """Callers that come at once, each going on from whole chunks of some earlier text; some leave before their end."""
    scheduler = Scheduler(FakeEngine(sequences, more=more))
    texts: list[list[int]] = [[]]
    for asked in rounds:
        prompts = [
            (texts[of % len(texts)][: chunks * CHUNK] + more)[: CAPACITY - 6] for of, chunks, more, _, _ in asked
        ]
        callers = [Caller(scheduler, prompt, count) for prompt, (_, _, _, count, _) in zip(prompts, asked, strict=True)]
        for caller, (_, _, _, _, leaves) in zip(callers, asked, strict=True):
            if leaves:
                next(iter(caller), None)
                scheduler.stop(caller.job)
                assert caller.tokens == alone(caller.prompt, len(caller.tokens))
            else:
                caller.finish()
            texts.append(caller.prompt + caller.tokens)


def test_all_answers_get_a_token_at_every_step() -> None:
    """Three callers that one thread serves: once their prompts are through, every step has each of them once."""
    engine = FakeEngine(3)
    scheduler = Scheduler(engine)
    callers = [Caller(scheduler, [index] * 3, 9) for index in range(3)]
    callers[1].finish()
    assert [len(caller.tokens) for caller in callers] == [9, 9, 9]
    assert [len(feeds) for feeds in engine.steps] == [3] * 9
    for caller in callers:
        caller.finish()


def test_a_long_prompt_and_a_running_answer_do_not_starve_each_other() -> None:
    """A chunk goes with every fifth token of the answer; alone, a prompt's chunks go together."""
    engine = FakeEngine(2, chunks_together=3)
    scheduler = Scheduler(engine)
    answer = Caller(scheduler, [1, 2], 30)
    next(iter(answer))
    long = Caller(scheduler, list(range(5 * CHUNK)), 2)
    long.finish()
    mixed = [[feed.decoding for feed in feeds] for feeds in engine.steps[1:]]
    chunk, tokens = [True, False], [[True]] * 4
    assert mixed[:22] == [chunk, *tokens] * 4 + [chunk, [True, True]]
    answer.finish()
    engine.steps.clear()
    Caller(scheduler, list(range(40, 40 + 7 * CHUNK)), 1).finish()
    assert [len(feeds) for feeds in engine.steps] == [3, 3, 1]


def test_prompts_take_turns() -> None:
    """The short one of two prompts that come together is not behind the long one."""
    engine = FakeEngine(2, chunks_together=1)
    scheduler = Scheduler(engine)
    long, short = Caller(scheduler, list(range(8 * CHUNK)), 1), Caller(scheduler, [50] * 2 * CHUNK, 1)
    short.finish()
    assert len(engine.steps) == 4
    long.finish()


@pytest.mark.parametrize(("more", "reused"), [(0, 0), (1, 0), (2, 8)])
def test_texts_beyond_those_at_once_keep_what_they_have(more: int, reused: int) -> None:
    """Three conversations in turns, one computed at a time: with two more texts each goes on from its own last turn."""
    scheduler = Scheduler(FakeEngine(1, more=more))
    callers = [Caller(scheduler, [start] * 8, 2) for start in range(3)]
    for caller in callers:
        caller.finish()
    callers = [Caller(scheduler, caller.prompt + caller.tokens, 2) for caller in callers]
    for caller in callers:
        caller.finish()
    assert [caller.job.reused for caller in callers] == [reused] * 3


def test_more_callers_than_texts_wait_in_order() -> None:
    """The counts say so; one that is stopped while it waits never begins, and the next takes the place at once."""
    engine = FakeEngine(1)
    scheduler = Scheduler(engine)
    first, second, third = (Caller(scheduler, [index], 3) for index in range(3))
    next(iter(first))
    assert (scheduler.active, scheduler.waiting) == (1, 2)
    scheduler.stop(second.job)
    assert (scheduler.active, scheduler.waiting) == (1, 1)
    assert [*second] == []
    scheduler.stop(first.job)
    assert (scheduler.active, scheduler.waiting) == (0, 1)
    third.finish()
    assert (len(first.tokens), second.tokens) == (1, [])


def test_a_caller_may_be_stopped_from_another_thread_in_the_middle_of_a_step() -> None:
    """Its place is free after the step; the one that computed goes on for itself."""
    engine = FakeEngine(2)
    scheduler = Scheduler(engine)
    one, other = Caller(scheduler, [1], 9), Caller(scheduler, [2], 9)
    inside, go_on, real = threading.Event(), threading.Event(), engine.step

    def slow(feeds: list[Feed]) -> list[np.ndarray]:
        inside.set()
        assert go_on.wait(HANG_S)
        return real(feeds)

    engine.step = slow
    thread = threading.Thread(target=one.finish, daemon=True)
    thread.start()
    assert inside.wait(HANG_S)
    scheduler.stop(other.job)
    assert (scheduler.active, other.job.ended) == (1, True)
    go_on.set()
    thread.join(HANG_S)
    assert one.tokens == alone([1], 9)
    assert other.tokens == []
    third = Caller(scheduler, [3], 2)
    third.finish()


def test_a_caller_that_finds_no_place_lets_the_others_leave_theirs() -> None:
    """A text that has ended is kept before its place is free; meanwhile who waits for one must not hold the lock."""
    scheduler = Scheduler(FakeEngine(1), FakePrefixes())
    first = Caller(scheduler, [1, 2, 3], 1)
    for _ in first:
        pass
    second = Caller(scheduler, [4, 5], 2)
    waiting = threading.Thread(target=second.finish, daemon=True)
    waiting.start()
    kept = threading.Thread(target=scheduler.keep, args=(first.job,), daemon=True)
    kept.start()
    kept.join(HANG_S)
    assert not kept.is_alive()
    waiting.join(HANG_S)
    assert not waiting.is_alive()
    assert second.tokens == alone([4, 5], 2)


def test_a_text_that_is_being_kept_is_nobody_elses() -> None:
    """Whoever stops its caller meanwhile: its place is free when it has been kept, and not before."""
    prefixes = FakePrefixes()
    scheduler = Scheduler(FakeEngine(1), prefixes)
    first = Caller(scheduler, [1, 2, 3], 1)
    for _ in first:
        pass
    second = Caller(scheduler, [4, 5], 1)

    def meanwhile() -> None:
        prefixes.before = lambda: None
        scheduler.stop(first.job)
        other = threading.Thread(target=second.finish, daemon=True)
        other.start()
        other.join(0.05)
        assert not second.tokens

    prefixes.before = meanwhile
    scheduler.keep(first.job)
    second.finish()


def test_who_fails_fails_alone() -> None:
    """What one text cannot compute ends it, and no other; its place serves the next."""
    engine = FakeEngine(3)
    scheduler = Scheduler(engine)
    callers = [Caller(scheduler, prompt, 6) for prompt in ([1] * 9, [2, POISON], [3])]
    raised = run_threads(callers)
    assert raised[0] is None
    assert isinstance(raised[1], DamagedFile)
    assert raised[2] is None
    run_threads([Caller(scheduler, [4], 3) for _ in range(3)])


def test_what_a_caller_does_itself_ends_only_it() -> None:
    """An error of its sampling, say, reaches the one that takes it; an interrupted thread leaves the others."""
    engine = FakeEngine(2)
    scheduler = Scheduler(engine)
    good = Caller(scheduler, [1], 5)

    def bad() -> Work:
        yield Ask([2])
        raise ZeroDivisionError

    job = Job(bad())
    scheduler.submit(job)
    next(iter(good))
    assert scheduler.advance(job)
    with pytest.raises(ZeroDivisionError):
        scheduler.advance(job)
    assert not scheduler.advance(job)
    engine.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        next(iter(good))
    good.finish()


def test_a_text_beyond_the_capacity_is_refused_and_leaves_its_place() -> None:
    """At its prompt, and at the token that is one too many."""
    scheduler = Scheduler(FakeEngine(1))
    with pytest.raises(BadInput, match="do not fit"):
        Caller(scheduler, [1] * (CAPACITY + 1), 1).finish()
    long = Caller(scheduler, [1] * CAPACITY, 2)
    with pytest.raises(BadInput, match="do not fit"):
        long.finish()
    assert long.tokens == alone([1] * CAPACITY, 1)
    Caller(scheduler, [1], 2).finish()


def test_a_caller_that_nobody_refers_to_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, or, where a thread holds the lock that moment, before its next step."""
    scheduler = Scheduler(FakeEngine(1))
    first, second = Caller(scheduler, [1], 5), Caller(scheduler, [2], 2)
    next(iter(first))
    with scheduler.turn:
        scheduler.drop(first.job)
        assert not first.job.ended
    second.finish()
    third = Caller(scheduler, [3], 5)
    next(iter(third))
    scheduler.drop(third.job)
    assert scheduler.active == 0
    del first, third
    gc.collect()


def test_closing_ends_everybody() -> None:
    """Those that wait and those that are computed get the error; nobody comes after."""
    scheduler = Scheduler(FakeEngine(1))
    first, second = Caller(scheduler, [1], 5), Caller(scheduler, [2], 2)
    next(iter(first))
    scheduler.close()
    for caller in (first, second):
        with pytest.raises(BadInput, match="closed"):
            caller.finish()
    with pytest.raises(BadInput, match="closed"):
        Caller(scheduler, [3], 1)
    scheduler.close()


def test_a_text_goes_on_where_another_parted_from_it() -> None:
    """In its place where most of that is kept; else a copy goes to an empty place, or to that which idled longest."""
    engine = FakeEngine(3)
    scheduler = Scheduler(engine)
    base = list(range(4 * CHUNK))

    def ask(prompt: list[int]) -> tuple[int, int]:
        """Tokens reused, and the place."""
        caller = Caller(scheduler, prompt, 1)
        caller.finish()
        assert caller.job.sequence is not None
        return caller.job.reused, engine.sequences.index(caller.job.sequence)

    assert ask(base) == (0, 0)
    assert ask([*base, 90]) == (4 * CHUNK, 0)  # the next turn
    assert ask([*base[:CHUNK], 60, 61]) == (CHUNK, 1)  # another that has only the first chunk: the first stays
    assert ask([*base, 91]) == (4 * CHUNK, 0)
    assert ask([*base[:CHUNK], 60, 61]) == (CHUNK, 1)
    assert ask([70] * CHUNK) == (0, 2)
    assert ask([*base[: 2 * CHUNK], 5, 5]) == (2 * CHUNK, 0)  # half of it is kept: no copy
    assert ask([80] * CHUNK) == (0, 1)  # not used for the longest time


def test_a_text_does_not_go_on_from_one_that_was_overwritten() -> None:
    """Two come at once: the first is copied over the text whose beginning the second has."""
    scheduler = Scheduler(FakeEngine(2))
    over, copied = list(range(2 * CHUNK)), list(range(50, 50 + 4 * CHUNK))
    Caller(scheduler, over, 1).finish()
    Caller(scheduler, copied, 1).finish()
    first, second = Caller(scheduler, [*copied[:CHUNK], 1, 2], 3), Caller(scheduler, [*over, 9], 3)
    first.finish()
    second.finish()
    assert (first.job.reused, second.job.reused) == (CHUNK, 0)


def test_a_text_goes_on_from_one_that_is_still_computed() -> None:
    """A second conversation with the same system prompt copies it while the first is in the middle of its answer."""
    engine = FakeEngine(2)
    scheduler = Scheduler(engine)
    system = list(range(3 * CHUNK))
    first = Caller(scheduler, [*system, 1], 20)
    next(iter(first))
    second = Caller(scheduler, [*system, 2], 4)
    second.finish()
    assert second.job.reused == 3 * CHUNK
    first.finish()


def test_tokens_that_come_together_and_scored_texts() -> None:
    """Tokens asked for apart are computed one by one in one step; all rows come for a text that is scored anew."""
    engine = FakeEngine(2)
    scheduler = Scheduler(engine)
    rows: list[int] = []

    def work() -> Work:
        rows.append(len((yield Ask(list(range(2 * CHUNK + 1)), "all"))))
        rows.append(len((yield Ask([1, 2, 3], "all", apart=True))))
        rows.append(len((yield Ask([4, 5, 6], "last", apart=True))))

    for _ in range(2):
        job = Job(work())
        scheduler.submit(job)
        while scheduler.advance(job):
            pass
        assert job.reused == 0
    assert rows == [2 * CHUNK + 1, 3, 1] * 2
    apart = [feeds for feeds in engine.steps if all(feed.decoding for feed in feeds)]
    assert [[len(feed.tokens) for feed in feeds] for feeds in apart] == [[1, 1, 1]] * 4


def test_something_is_done_between_steps_and_holds_nobody_up() -> None:
    """While callers compute in their threads: no step is under way meanwhile, and each answer is its own."""
    engine = FakeEngine(3)
    scheduler, inside = Scheduler(engine), threading.Lock()
    step = engine.step

    def alone_step(feeds: list[Feed]) -> list[np.ndarray]:
        assert inside.acquire(blocking=False)
        try:
            return step(feeds)
        finally:
            inside.release()

    def act() -> int:
        assert inside.acquire(blocking=False)
        threading.Event().wait(0.0005)  # for a step to begin that should not
        inside.release()
        return len(engine.steps)

    engine.step = alone_step
    callers = [Caller(scheduler, [5, number], 40) for number in range(6)]
    seen: list[int] = []
    paused = threading.Thread(target=lambda: seen.extend(scheduler.between_steps(act) for _ in range(30)), daemon=True)
    paused.start()
    assert run_threads(callers) == [None] * 6
    paused.join(HANG_S)
    assert len(seen) == 30
    assert seen == sorted(seen)
    scheduler.close()
    with pytest.raises(BadInput, match="closed"):
        scheduler.between_steps(act)
