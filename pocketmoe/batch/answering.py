"""Answers the prompts of a file through one loaded model, several at once, and goes on where an earlier run ended."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pocketmoe.batch.prompts import BatchPrompt, read_prompts
from pocketmoe.batch.results import Results, in_order, key_of
from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import BadInput, ContextFull
from pocketmoe.runtime.conversation import Generation
from pocketmoe.runtime.model import LoadRequest, Model

Record = dict[str, Any]
Answered = tuple[BatchPrompt, list[Generation] | BadInput]  # a prompt, and its answers or why it has none
_ANSWERING = "answering"
_FIGURES = ("prompt_tokens", "reused_tokens", "ttft_s", "decode_tokens_per_s", "total_s")


@dataclass(frozen=True)
class BatchRequest:
    """What to answer and how. `options`: those of `Model.stream`, for every prompt."""

    file: Path  # of prompts
    output: Path | None = None  # the file of answers, with which a second start goes on; None: only `on_answer`
    load: LoadRequest = field(default_factory=LoadRequest)
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    before: tuple[Mapping[str, Any], ...] = ()  # messages before each prompt
    n: int = 1  # answers to each prompt; a seed is that of the first
    at_once: int = 1  # prompts

    def decisive(self) -> dict[str, Any]:
        """Of all this, what changes an answer."""
        inexact = {
            name: getattr(self.load, name) for name in ("drop_cold", "prefer_cached") if getattr(self.load, name)
        }
        return {**self.options, **inexact, "before": self.before, "n": self.n}


@dataclass(frozen=True)
class BatchReport:
    """What a batch came to. Figures are of this run; bytes are 0 where nothing was left to be done."""

    prompts: int
    answered: int
    answered_before: int  # by an earlier run
    refused: int
    generated_tokens: int
    seconds: float  # of answering, loading not included
    peak_memory_bytes: int
    memory_budget_bytes: int


class _Stopped(Exception):
    """The batch ends, and so does the answer that somebody was at."""


def answer_batch(
    path: Path,
    request: BatchRequest,
    on_answer: Callable[[Record], None],
    on_refused: Callable[[BatchPrompt, BadInput], None],
    progress: Progress = no_progress,
) -> BatchReport:
    """Answer all prompts of a file that have no answer yet.

    `on_answer` gets each as it is ready; `on_refused` gets prompts that cannot be answered, too long ones for example,
    which the next start tries again. Raises what `Model` raises, BadInput for the files, OutputError.
    """
    prompts = read_prompts(request.file)
    decisive, seal = request.decisive(), Bundle.open(path).manifest.sha256
    keys = {prompt.id: key_of(prompt, decisive, seal) for prompt in prompts}
    with contextlib.ExitStack() as stack:
        results = stack.enter_context(Results(request.output, keys)) if request.output else None
        left = [prompt for prompt in prompts if results is None or prompt.id not in results.done]
        before = len(prompts) - len(left)
        if before:
            progress(f"{before} of {len(prompts)} prompts are answered already", 0, 0)
        if not left:
            return BatchReport(len(prompts), 0, before, 0, 0, 0.0, 0, 0)
        model = stack.enter_context(Model(path, request.load, progress))
        began, answered, tokens = time.perf_counter(), 0, 0
        answers = stack.enter_context(contextlib.closing(_answers(model, left, request)))
        for done, (prompt, answer) in enumerate(answers, 1):
            if isinstance(answer, BadInput):
                on_refused(prompt, answer)
            else:
                record = {"id": prompt.id, "key": keys[prompt.id], **_record(answer)}
                if results:
                    results.add(record)
                on_answer(record)
                answered, tokens = answered + 1, tokens + sum(len(each.tokens) for each in answer)
            progress(_ANSWERING, before + done, len(prompts))
        seconds, memory = time.perf_counter() - began, model.memory
        if request.output and before + answered == len(prompts):
            in_order(request.output, prompts)
    refused = len(left) - answered
    return BatchReport(len(prompts), answered, before, refused, tokens, seconds, memory["peak"], memory["budget"])


def _answers(model: Model, prompts: Sequence[BatchPrompt], request: BatchRequest) -> Generator[Answered]:
    """In the order in which they are ready."""
    stopping = threading.Event()

    def work(prompt: BatchPrompt) -> Answered:
        try:
            return prompt, [_answer(model, prompt, request, index, stopping) for index in range(request.n)]
        except BadInput as error:
            if type(error) in (BadInput, ContextFull):
                return prompt, error
            raise  # the bundle is damaged, or the disk is full: nobody's prompt is to blame

    if request.at_once == 1:
        yield from map(work, prompts)
        return
    with ThreadPoolExecutor(request.at_once) as pool:
        try:
            waiting = iter(prompts)
            running: set[Future[Answered]] = set()
            while True:
                for prompt in waiting:
                    running.add(pool.submit(work, prompt))
                    if len(running) == request.at_once:
                        break
                if not running:
                    return
                ready, running = wait(running, return_when=FIRST_COMPLETED)
                for future in ready:
                    yield future.result()
        finally:
            stopping.set()


def _answer(
    model: Model, prompt: BatchPrompt, request: BatchRequest, index: int, stopping: threading.Event
) -> Generation:
    """The answer number `index` to a prompt."""
    options = dict(request.options)
    if options.get("seed") is not None:
        options["seed"] += index
    text: Any = prompt.prompt
    if request.before:
        said = [{"role": "user", "content": text}] if isinstance(text, str) else text
        text = [*request.before, *said]

    def look(_done: int, _total: int) -> None:
        if stopping.is_set():
            raise _Stopped

    with model.stream(text, **options, on_prompt=look) as stream:
        for _ in stream:
            look(0, 0)
        return stream.result


def _record(answers: Sequence[Generation]) -> Record:
    """What a line says of a prompt's answers: of the first one, and of all where there are several."""
    records = [_of(answer) for answer in answers]
    return records[0] if len(records) == 1 else {**records[0], "answers": records}


def _of(answer: Generation) -> Record:
    record: Record = {"text": answer.text, "tokens": answer.tokens, "stop_reason": answer.stop_reason}
    record |= {"generated_tokens": len(answer.tokens), **{name: getattr(answer, name) for name in _FIGURES}}
    if answer.logprobs is not None:
        record["logprobs"] = [asdict(entry) for entry in answer.logprobs]
    return record
