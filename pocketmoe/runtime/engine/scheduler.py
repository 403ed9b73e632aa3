"""Lets several callers use one engine at once: their texts go through the layers together, a token of each at a step.

There is no thread for it. Whoever waits for its own text to come further computes the next step for all, one caller at
a time, while the others wait for what it brings. So nothing is computed that nobody waits for, a single caller computes
in its own thread as if it were alone, and a caller that goes away or is interrupted leaves its part to the next.

A prompt is computed in chunks, those of several prompts in turns. While answers are being computed one chunk goes along
with every fifth of their tokens: experts are read once for all, an answer waits for one chunk at most, and a prompt
for four tokens. More prompts than there are texts wait, first come, first served.

A new text goes on from the longest beginning that any text has kept. Who fails, fails alone: a step that raises left
every text as it was, and is taken again for each by itself.
"""

from __future__ import annotations

import contextlib
import threading
from collections import abc, deque
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from pocketmoe.errors import BadInput, OverBudget
from pocketmoe.runtime.engine.engine import Engine, Feed, feeds_of
from pocketmoe.runtime.engine.segments import Rows
from pocketmoe.runtime.engine.sequence import Sequence

Result = TypeVar("Result")

_STEPS_PER_CHUNK = (
    4  # tokens of answers between two that go with a prompt's chunk; a chunk takes 10 to 20 times as long
)
_LOOK_AGAIN_S = 0.5  # when a caller that was dropped while another thread held the lock is found at the latest


class Ask(NamedTuple):
    """Tokens that are to follow a text. `apart`: each is computed by itself, as a decode step would."""

    tokens: abc.Sequence[int]
    rows: Rows = "last"  # whose logits are wanted
    apart: bool = False


Work = Generator[Ask, np.ndarray, None]  # says what to feed, is sent the logits, float32 [rows, vocab], and so on


@dataclass(eq=False)
class Job:
    """A text that a caller wants computed. Its `work` begins with the prompt; who reads it holds no lock."""

    work: Work
    done: int = 0  # tokens of the prompt that are computed
    total: int = 0  # tokens of the prompt
    reused: int = 0  # of those, computed for an earlier text
    error: Exception | None = None
    ended: bool = False
    moved: bool = False  # since its caller looked
    sequence: Sequence | None = None
    ask: Ask = field(default_factory=lambda: Ask(()))
    todo: list[int] = field(default_factory=list[int])  # tokens that are still to be fed of what was asked
    logits: list[np.ndarray] = field(default_factory=list[np.ndarray])
    at_prompt: bool = True
    begins_as: Sequence | None = None  # the text whose beginning this one takes over, until it has
    lingers: bool = False  # it has ended, and its place is its caller's until that leaves

    @property
    def decoding(self) -> bool:
        """Whether its next tokens are those of an answer."""
        return not self.at_prompt and len(self.todo) <= len(self.ask.tokens)

    def feeds(self, chunks: int) -> list[Feed]:
        """Its next chunks, so many at most."""
        assert self.sequence is not None, "a text that is computed has its place"
        decoding = self.decoding and (self.ask.apart or len(self.todo) == 1)
        feeds = feeds_of(self.sequence, self.todo, self.ask.rows, decoding=decoding, apart=self.ask.apart)
        return feeds[: chunks if self.sequence.layout.local else 1]


class Prefixes(Protocol):
    """What is kept elsewhere of texts' beginnings."""

    def restore(self, sequence: Sequence, tokens: abc.Sequence[int], most: int, in_memory: int) -> int:
        """Have a text begin with more of `tokens` than `in_memory`, at most `most`; how many these are.

        0 where there are none: the text is then as it was, or empty.
        """
        ...

    def keep(self, sequence: Sequence) -> None:
        """Keep what a text has."""
        ...


class Scheduler:
    """The callers of one engine. All but `advance` return at once."""

    def __init__(self, engine: Engine, prefixes: Prefixes | None = None) -> None:
        """`prefixes`: where beginnings are kept that no text in memory has."""
        self._engine, self._prefixes = engine, prefixes
        self.idle = list(engine.sequences)  # texts that nobody computes; those that were of use last stand last
        self._waiting: deque[Job] = deque()
        self._active: deque[Job] = deque()  # a prompt that has had a chunk goes to the end
        self._dropped: deque[Job] = deque()
        self.turn = threading.Condition(threading.Lock())  # guards all that callers share
        self._computing = False
        self._pausing = 0  # those for whom no step begins
        self._until_chunk = 0  # tokens of answers before a prompt's next chunk
        self._closed = False

    @property
    def active(self) -> int:
        """Texts that are being computed."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """Texts that wait for a place."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Let a job wait for its turn. Raises BadInput once this is closed."""
        with self.turn:
            if self._closed:
                raise BadInput("the model is closed", "Load it again.")
            if not job.ended:
                self._waiting.append(job)

    def advance(self, job: Job) -> bool:
        """Return when a job has come further, True, or has ended, False; meanwhile compute, or wait for who does.

        Raises what ended it, once.
        """
        with self.turn:
            while not (job.moved or job.ended):
                if self._computing or self._pausing:
                    self.turn.wait(_LOOK_AGAIN_S)
                    continue
                self._computing = True
                try:
                    computed = self._take_step()
                finally:
                    self._computing = False
                    self.turn.notify_all()
                if not (computed or job.moved or job.ended):  # until somebody leaves a place
                    self.turn.wait(_LOOK_AGAIN_S)
            if job.moved:
                job.moved = False
                return True
            error, job.error = job.error, None
        if error is not None:
            raise error
        return False

    def keep(self, job: Job) -> None:
        """Keep what a job that has ended well has computed, and leave its place. Its caller's own business."""
        with self.turn:
            if not job.lingers or self._prefixes is None or job.sequence is None:
                return
            job.lingers = False  # whoever stops it now does not give its place away
        try:
            self._prefixes.keep(job.sequence)
        finally:
            with self.turn:
                self.idle.append(job.sequence)
                self.turn.notify_all()

    def stop(self, job: Job) -> None:
        """End a job: nothing more is sent to its work. Its place is free after the step that is under way."""
        with self.turn:
            self._end(job)
            self.turn.notify_all()

    def drop(self, job: Job) -> None:
        """The same, also in the middle of anything: the interpreter drops what nobody refers to any more."""
        self._dropped.append(job)
        if self.turn.acquire(blocking=False):
            try:
                self._sweep()
                self.turn.notify_all()
            finally:
                self.turn.release()

    def between_steps(self, act: abc.Callable[[], Result]) -> Result:
        """Do something to the engine after the step that is under way; meanwhile all callers wait.

        Raises BadInput once this is closed.
        """
        with self.turn:
            self._pausing += 1
            try:
                while self._computing:
                    self.turn.wait(_LOOK_AGAIN_S)
                if self._closed:
                    raise BadInput("the model is closed", "Load it again.")
                with self._unlocked():
                    return act()
            finally:
                self._pausing -= 1
                self.turn.notify_all()

    def close(self) -> None:
        """End all jobs, after the step that is under way; their callers get BadInput."""
        with self.turn:
            self._closed = True
            for job in [*self._waiting, *self._active]:
                self._end(job, BadInput("the model was closed before the answer had ended"))
            self.turn.notify_all()
            while self._computing:
                self.turn.wait(_LOOK_AGAIN_S)

    def _take_step(self) -> bool:
        """Compute the next step of all; whether there was any. The lock is held, but not while it is computed."""
        self._sweep()
        self._admit()
        plan = self._plan()
        if not plan:
            return False
        with self._unlocked():
            results = self._compute(plan)
        while results:
            job, result = results.popitem()
            try:
                self._guarded(job, lambda job=job, result=result: self._take(job, plan[job], result))
            except BaseException:
                for other in results:
                    self._end(other, BadInput("the caller that computed was interrupted", "Ask again."))
                raise
        return True

    def _sweep(self) -> None:
        while self._dropped:
            self._end(self._dropped.popleft())

    def _admit(self) -> None:
        """Give those that wait the places there are. Nothing is computed meanwhile.

        One after the other: a text that begins may overwrite another, from which the next one would have gone on.
        """
        for job in [job for job in self._active if job.begins_as is not None]:  # its caller was interrupted
            self._start(job)
        while self._waiting and len(self._engine.sequences) - len(self.idle) < self._engine.at_once:
            job = self._waiting.popleft()
            self._active.append(job)
            self._guarded(job, lambda job=job: self._place(job))
            self._start(job)

    def _start(self, job: Job) -> None:
        """Let a text that has its place take over its beginning there."""
        if job.begins_as is None:
            return
        with self._unlocked():
            error = _begin(job, self._prefixes)
        self._guarded(job, lambda: self._ask(job, job.ask, error))

    def _place(self, job: Job) -> None:
        """Choose a job's place, and the text whose beginning it goes on from.

        The one that has kept most, in its own place where that keeps half of it at least; else its beginning is copied
        to a place without a text, or to the one that was of use the longest time ago.
        """
        job.ask = next(job.work)
        job.total = len(job.ask.tokens)
        most = 0 if job.ask.rows == "all" else job.total - 1
        kept = {sequence: sequence.reusable(job.ask.tokens, most) for sequence in self._engine.sequences}
        best = max(kept, key=lambda sequence: (kept[sequence], sequence in self.idle, -len(sequence.tokens)))
        if kept[best] and best in self.idle:
            self.idle.remove(best)
            self.idle.append(best)
        goes_on = best in self.idle and 2 * kept[best] >= best.reusable(best.tokens)
        place = best if goes_on else next((place for place in self.idle if not place.tokens), self.idle[0])
        self.idle.remove(place)
        job.sequence, job.begins_as, job.reused = place, best if kept[best] else place, kept[best]

    def _ask(self, job: Job, ask: Ask, error: Exception | None = None) -> None:
        """Note what a job wants to be fed next."""
        assert job.sequence is not None, "what is asked for a text has a place"
        if error is not None:
            raise error
        job.ask = ask
        job.todo = job.sequence.to_feed(ask.tokens[job.reused :] if job.at_prompt else ask.tokens)
        job.done = job.reused if job.at_prompt else job.done

    def _plan(self) -> dict[Job, list[Feed]]:
        """What goes through the layers in the next step."""
        answers = [job for job in self._active if job.decoding]
        prompts = [job for job in self._active if not job.decoding]
        plan = {job: job.feeds(len(job.todo)) for job in answers}
        self._until_chunk -= 1
        if not prompts or (answers and self._until_chunk >= 0):
            return plan
        self._until_chunk = _STEPS_PER_CHUNK if answers else 0
        for job, chunks in dealt(prompts, 1 if answers else self._engine.chunks_together).items():
            plan[job] = job.feeds(chunks)
            self._active.remove(job)
            self._active.append(job)
        return plan

    def _compute(self, plan: dict[Job, list[Feed]]) -> dict[Job, list[np.ndarray] | Exception]:
        """The logits of each job's chunks, or why there are none."""
        try:
            logits = iter(self._engine.step([feed for feeds in plan.values() for feed in feeds]))
        except Exception as error:  # noqa: BLE001 - carried to its caller
            if len(plan) == 1:
                return dict.fromkeys(plan, error)
            return {job: result for alone in plan for job, result in self._compute({alone: plan[alone]}).items()}
        return {job: [next(logits) for _ in feeds] for job, feeds in plan.items()}

    def _take(self, job: Job, feeds: list[Feed], result: list[np.ndarray] | Exception) -> None:
        """Note what a step has brought a job; once that is all it has asked for, its work goes on."""
        if isinstance(result, Exception):
            raise result
        fed = sum(len(feed.tokens) for feed in feeds)
        del job.todo[:fed]
        job.logits += result
        job.moved = True
        if job.at_prompt:
            job.done += fed
        if job.todo:
            return
        rows = job.logits[0] if len(job.logits) == 1 else np.concatenate(job.logits)
        job.logits, job.at_prompt = [], False
        self._ask(job, job.work.send(rows[-len(job.ask.tokens) :]))

    def _guarded(self, job: Job, act: abc.Callable[[], None]) -> None:
        """Do something for a job that has not ended; what its work raises is its own end."""
        if job.ended:
            return
        try:
            act()
        except StopIteration:
            self._end(job, lingers=self._prefixes is not None)
        except Exception as error:  # noqa: BLE001 - carried to its caller
            self._end(job, error)
        except BaseException:
            self._end(job, BadInput("the caller that computed was interrupted", "Ask again."))
            raise

    def _end(self, job: Job, error: Exception | None = None, lingers: bool = False) -> None:
        """A job leaves, or `lingers` until it is ended once more.

        Its place is taken by another before the next step at the earliest.
        """
        if job.ended:
            if job.lingers and job.sequence is not None:
                job.lingers = False
                self.idle.append(job.sequence)
            return
        job.ended, job.error = True, error
        for queue in (self._waiting, self._active):
            if job in queue:
                queue.remove(job)
        if job.sequence is not None:
            job.lingers = lingers
            self.idle += [] if lingers else [job.sequence]

    @contextlib.contextmanager
    def _unlocked(self) -> Generator[None]:
        self.turn.release()
        try:
            yield
        finally:
            self.turn.acquire()


def _begin(job: Job, prefixes: Prefixes | None) -> Exception | None:
    """Take over the beginning that a job goes on from, or a longer one of `prefixes`; what went wrong, if anything."""
    place, other = job.sequence, job.begins_as
    assert place is not None, "a job that begins has its place"
    assert other is not None, "and begins as some text"
    try:
        most = 0 if job.ask.rows == "all" else job.total - 1
        restored = prefixes.restore(place, job.ask.tokens, most, job.reused) if prefixes and most else 0
        if restored:
            job.reused = restored
        else:
            job.reused = place.truncate(job.reused) if other is place else place.fork(other, job.reused)
    except MemoryError:
        return OverBudget("a text's beginning needs more memory than there is for it")
    except Exception as error:  # noqa: BLE001 - carried to its caller
        return error
    job.begins_as = None
    return None


def dealt(prompts: abc.Sequence[Job], chunks: int) -> dict[Job, int]:
    """How many chunks of each prompt are next, `chunks` in all at most, one of each in turns."""
    left = {job: len(job.feeds(chunks)) for job in prompts}
    given = dict.fromkeys(prompts, 0)
    while chunks and any(left.values()):
        for job in [job for job in prompts if left[job]][:chunks]:
            left[job] -= 1
            given[job] += 1
            chunks -= 1
    return {job: count for job, count in given.items() if count}
