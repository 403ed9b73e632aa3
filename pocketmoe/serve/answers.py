"""Answers a piece of work: the model computes in a thread of its own, what happens comes to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

from pocketmoe.runtime.answer import TokenLogprob
from pocketmoe.runtime.conversation import Stream
from pocketmoe.runtime.model import Model
from pocketmoe.serve.api.errors import refused, unsupported
from pocketmoe.serve.api.sampling import refuse_foreign_ids
from pocketmoe.serve.api.work import Choice, Ended, Event, Piece, Progress, Question, Scored, Work
from pocketmoe.serve.load import Room


class _Gone(Exception):
    """Nobody wants the answer any more."""


@dataclass
class Prepared:
    """Work whose prompts are token ids that fit the context."""

    work: Work
    model: Model
    streams: list[Stream]
    choices: list[Choice]
    stopped: threading.Event = field(default_factory=threading.Event)
    began: float = field(default_factory=time.monotonic)
    on_prompt: Callable[[int, int], None] | None = None

    def stop(self) -> None:
        """The answer is not wanted any more; from any thread. What is computed of it ends with the step under way."""
        self.stopped.set()
        for stream in self.streams:
            stream.close()


def prepare(work: Work, model: Model, structured: bool = True) -> Prepared:
    """Make token ids of the prompts. Raises ApiError or BadInput for prompts that cannot be answered.

    `structured`: whether there is memory for answers that are held to a schema.
    """
    if "json_schema" in work.options and not structured:
        raise unsupported("response_format", "this server was started without memory for structured output")
    prepared = Prepared(work, model, [], [])

    def on_prompt(done: int, total: int) -> None:
        if prepared.on_prompt:
            prepared.on_prompt(done, total)

    _refuse_impossible(work, model)
    for prompt in work.prompts:
        for repeat in range(work.n):
            options: dict[str, Any] = {**work.options, "on_prompt": on_prompt}
            if repeat and options.get("seed") is not None:
                options["seed"] = (options["seed"] + repeat) % 2**64
            stream = model.stream(prompt, **options)
            known = stream.so_far
            parser = known.speech.parser(known.reasoning_begun)
            prepared.choices.append(Choice(len(prepared.streams), known.prompt_tokens, parser))
            prepared.streams.append(stream)
    return prepared


def _refuse_impossible(work: Work, model: Model) -> None:
    vocab_size = model.bundle.manifest.model.vocab_size
    for prompt in work.prompts:
        if not prompt:  # such as items without a text
            raise refused(work.param, "there is nothing that could be answered")
        if not isinstance(prompt, str) and isinstance(prompt[0], int):
            refuse_foreign_ids([*prompt], vocab_size, work.param)  # type: ignore[list-item]
        elif not isinstance(prompt, str) and not model.has_chat_template:
            raise refused(work.param, "this model has no chat template: use /v1/completions")
    for variable, param in work.variables.items():
        if not model.template_mentions(variable):
            raise unsupported(param, f"this model's chat template knows no {variable}")
    refuse_foreign_ids(work.options.get("logit_bias") or {}, vocab_size, "logit_bias")


def compute(prepared: Prepared, tell: Callable[[Event], None]) -> None:
    """Answer in this thread. `tell` gets what happens; what fails is raised."""
    for choice, stream in zip(prepared.choices, prepared.streams, strict=True):

        def on_prompt(done: int, total: int, index: int = choice.index) -> None:
            if prepared.stopped.is_set():
                raise _Gone
            tell(Progress(index, done, total))

        prepared.on_prompt = on_prompt
        if prepared.stopped.is_set():
            return
        if prepared.work.score is not None:
            tell(_score(prepared, choice.index))
        if not prepared.work.answers:
            continue
        with contextlib.suppress(_Gone), stream:
            if not _answer(prepared, choice.index, stream, tell):
                return


def _score(prepared: Prepared, index: int) -> Scored:
    """How likely the tokens of a choice's prompt are."""
    prompt = prepared.work.prompts[index // prepared.work.n]
    ids = prepared.model.tokenize(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]  # type: ignore[arg-type]
    return Scored(index, ids, prepared.model.logprobs(ids, prepared.work.score or 0))


def _answer(prepared: Prepared, index: int, stream: Stream, tell: Callable[[Event], None]) -> bool:
    """Whether it was wanted to its end."""
    told = told_logprobs = 0
    for text in stream:
        if prepared.stopped.is_set():
            return False
        tokens: Sequence[int] = stream.so_far.tokens[told:]
        logprobs: Sequence[TokenLogprob] = stream.so_far.logprobs[told_logprobs:]
        told, told_logprobs = told + len(tokens), told_logprobs + len(logprobs)
        tell(Piece(index, text, tokens, logprobs))
    if prepared.stopped.is_set():
        return False
    result = stream.result
    if len(result.tokens) > told:
        tell(Piece(index, "", result.tokens[told:], (result.logprobs or ())[told_logprobs:]))
    tell(Ended(index, result))
    return True


class Answering:
    """The threads that compute, and the places they have."""

    def __init__(self, places: Room, threads: Executor, tokenizing: Executor, structured: bool = True) -> None:
        """`structured`: see `prepare`."""
        self._structured = structured
        self._places, self._threads, self._tokenizing = places, threads, tokenizing

    async def prepare(self, work: Work, model: Model) -> Prepared:
        """Token ids of the prompts, one request's at a time. Raises what `prepare` does."""
        return await asyncio.get_running_loop().run_in_executor(
            self._tokenizing, prepare, work, model, self._structured
        )

    async def ask(self, question: Question, model: Model) -> Any:
        """What a model can tell at once, one request's at a time."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, question.answer, model)

    async def events(self, prepared: Prepared) -> AsyncGenerator[Event]:
        """What happens, once there is a place. Closed early, the work ends within a step, and then gives its place."""
        await self._places.take()
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | None] = asyncio.Queue()

        def tell(event: Event | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
                loop.call_soon_threadsafe(events.put_nowait, event)

        def work() -> None:
            try:
                compute(prepared, tell)
            finally:
                tell(None)

        try:
            done = loop.run_in_executor(self._threads, work)
        except BaseException:
            self._places.give()
            raise
        done.add_done_callback(lambda _: self._places.give())
        try:
            while (event := await events.get()) is not None:
                yield event
            await done
        finally:
            prepared.stop()
            done.add_done_callback(_seen)


def _seen(done: asyncio.Future[None]) -> None:
    """An error that came after nobody wanted the answer any more is nobody's."""
    if not done.cancelled():
        done.exception()
