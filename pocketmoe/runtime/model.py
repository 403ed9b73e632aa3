"""A loaded model that answers calls, several at once: what the Python API, `chat` and servers stand on."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack

from pocketmoe.bundle.packed import PackedPlace
from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import BadInput, ContextFull
from pocketmoe.grammar.guide import guide_bytes, is_available
from pocketmoe.runtime.answer import Answer, Counts, TokenLogprob, asked_for, token_logprob
from pocketmoe.runtime.backends.choice import BackendName
from pocketmoe.runtime.backends.slots import SlotBackend
from pocketmoe.runtime.conversation import Chat, Generation, Messages, Outcome, Stream
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.memory_plan import CHUNK, MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.engine.scheduler import Ask, Job, Scheduler, Work
from pocketmoe.runtime.engine.statistics import Activity
from pocketmoe.runtime.paging.expert_counts import ExpertCounts
from pocketmoe.runtime.paging.prefetch import PrefetchMode
from pocketmoe.runtime.prefix_cache.cache import MEMORY_BYTES
from pocketmoe.runtime.prefix_cache.kept import KeptPrefixes, PrefixCacheRequest
from pocketmoe.runtime.run import default_threads, expect_usual
from pocketmoe.runtime.sampling import Sampling, authors_sampling, log_softmax
from pocketmoe.runtime.tokenizer import Text
from pocketmoe.tools.messages import for_template
from pocketmoe.tools.speech import Speech, speech

Prompt = str | Messages | Sequence[int]

DEFAULT_CONTEXT = 4096  # tokens; more take memory from the experts, whether used or not


class Options(TypedDict, total=False):
    """What an answer may be asked for. The names of `Sampling` replace its defaults one by one."""

    max_tokens: int | None  # default 512; None: as long as the context allows
    stop: str | Sequence[str]  # the answer ends before the first of these strings
    authors: bool  # sample as the model's authors do (generation_config.json) where nothing else is said
    logprobs: int | None  # give each token's log probability, and those of so many likeliest ones
    raw: bool  # a string is continued as it is, without the model's chat template
    template: Mapping[str, Any]  # variables for the chat template, such as {"enable_thinking": False}
    json_schema: Mapping[str, Any] | str | type  # what the answer is held to: JSON, or a class with model_json_schema
    regex: str  # likewise: an expression that matches the whole answer
    grammar: str  # likewise: a grammar in llguidance's form of Lark
    tools: Sequence[Mapping[str, Any]]  # functions that the model may call, as OpenAI has them
    tool_choice: str | Mapping[str, Any]  # auto, none, required, or the one that is to be called
    parallel_tool_calls: bool  # False: one at most
    on_prompt: Callable[[int, int], None]  # tokens of the prompt that are computed, and all of them
    temperature: float
    top_p: float
    seed: int | None
    top_k: int
    min_p: float
    typical_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    no_repeat_ngram: int
    min_tokens: int
    logit_bias: Mapping[int, float]


_SNAPSHOTS = 4  # of each text's states that do not grow, where there are several texts
_LOGITS_BYTES = 16 << 20  # of a piece of text that is scored; what a prompt's chunk may take beside its logits is more


@dataclass(frozen=True)
class LoadRequest:
    """How to load a model. `context`: the longest text in tokens; None: 4096, or the model's own if that is less.

    `sequences`: texts that are computed at once, each with memory for `context` tokens, and kept for what begins alike.
    `structured`: set memory aside for answers that are held to a schema or a grammar; None: where that is installed.
    """

    memory: MemoryRequest | None = None
    context: int | None = None
    threads: int | None = None
    backend: BackendName = "auto"
    prefetch: PrefetchMode = "auto"
    drop_cold: float = 0.0
    prefer_cached: float = 0.0
    beside_bytes: int = 0  # of the budget, for what the rest of the process, such as a server, will come to take
    sequences: int = 1
    structured: bool | None = None
    prefix_cache: PrefixCacheRequest | None = None  # where what prompts compute is kept on disk: it reveals the texts
    packed: PackedPlace | None = None  # for packed experts that cannot, or are not to, lie in the bundle


class Model:
    """One engine for callers in any threads, until it is closed: `sequences` texts are computed together."""

    def __init__(self, path: Path, request: LoadRequest, progress: Progress = no_progress) -> None:
        """Raises BadInput or DamagedFile for the bundle, BudgetTooSmall or OverBudget for the memory."""
        began = time.perf_counter()
        self.bundle = Bundle.open(path, request.packed)
        exact = not (request.drop_cold or request.prefer_cached)
        self._prefixes = KeptPrefixes.open(request.prefix_cache, self.bundle, exact, progress)
        self._text = Text(self.bundle)
        self._chat_template = self._text.chat
        if self._chat_template is not None:
            with contextlib.suppress(BadInput):  # compiled before memory is reckoned; a real text may do better
                self._chat_template.render([{"role": "user", "content": "Hello"}])
        limit = self.bundle.manifest.model.context_length
        if request.context is not None and not 1 < request.context <= limit:
            raise BadInput(f"a context of {request.context} tokens is not between 2 and the model's {limit}")
        self.context_length = request.context or min(DEFAULT_CONTEXT, limit)
        self.threads = request.threads or default_threads()
        options = EngineOptions(
            memory=request.memory or MemoryRequest(),
            capacity=self.context_length,
            threads=self.threads,
            backend=request.backend,
            prefetch=request.prefetch,
            drop_cold=request.drop_cold,
            prefer_cached=request.prefer_cached,
            reuses=True,
            sequences=request.sequences,
            snapshots=_SNAPSHOTS if request.sequences > 1 else 1,
            capped=True,
            beside_bytes=request.beside_bytes + self._guide_bytes(request) + (MEMORY_BYTES if self._prefixes else 0),
        )
        engine = Engine(self.bundle, options, progress)
        self._engine: Engine | None = engine
        self._scheduler = Scheduler(engine, self._prefixes)
        self._counts = self._open_counts(engine, request.prefer_cached)
        self.load_s = time.perf_counter() - began

    def _guide_bytes(self, request: LoadRequest) -> int:
        """What is set aside for answers that are held to something: one grammar for each text at once."""
        wanted = is_available() if request.structured is None else request.structured
        return guide_bytes(self.bundle.manifest.model.vocab_size, request.sequences) if wanted else 0

    def _open_counts(self, engine: Engine, prefer_cached: float) -> ExpertCounts | None:
        """Where uses are noted for later runs; None where that would feed on itself, or is of no use."""
        counts = expect_usual(engine)
        return counts if engine.opened.backend == SlotBackend.name and not prefer_cached else None

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Generation:
        """The answer to a text, to messages (dicts with role and content), or to token ids.

        A string is a user's message where the model has a chat template, unless `raw` is said. Raises ContextFull for a
        prompt that leaves no room, BadInput for what cannot be, OverBudget and DamagedFile from the engine.
        """
        with self.stream(prompt, **options) as stream:
            for _ in stream:
                pass
            return stream.result

    def generate_many(self, prompt: Prompt, n: int, **options: Unpack[Options]) -> list[Generation]:
        """`n` answers to one prompt. A seed is that of the first; the next ones have the numbers after it."""
        seed = options.get("seed")
        seeds = [None if seed is None else seed + index for index in range(n)]
        return [self.generate(prompt, **{**options, "seed": each}) for each in seeds]

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Stream:
        """The pieces of an answer as they become certain. Nothing happens before the first one is asked for.

        It may be read and closed in any thread. Where as many others as there are `sequences` have not ended, it waits
        for one of them.
        """
        return self._stream(prompt, None, options)

    def _stream(
        self, prompt: Prompt, on_end: Callable[[Generation], None] | None, options: Mapping[str, Any]
    ) -> Stream:
        spoken = speech(self._text.dialect, options)
        asked = asked_for(self.sampling if options.get("authors") else Sampling(), options, spoken, self._text.term)
        template: dict[str, Any] = {**(options.get("template") or {}), **spoken.variables}
        ids, rendered = self._ids(prompt, options.get("raw", False), template)
        begun = rendered is not None and spoken.dialect.opens_reasoning(rendered)
        if len(ids) >= self.context_length:
            raise ContextFull(len(ids), self.context_length, "the context")

        engine = self.engine
        guide = self._text.guide(asked.constraint, rendered) if asked.constraint else None
        answer = Answer(engine, self._text, ids, asked, self.context_length, guide)
        outcome = Outcome(len(ids), begun, answer.tokens, spoken, answer.logprobs)
        job, settling = Job(answer.steps()), threading.Lock()

        def settle() -> None:
            if answer.tokens and settling.acquire(blocking=False):  # once, by whoever ends it
                answer.reused_tokens = job.reused
                outcome.result = self._generation(answer, engine, begun, spoken)
                if on_end:
                    on_end(outcome.result)

        def pieces() -> Generator[str, None, None]:
            try:
                yield from self._pieces(job, answer, options.get("on_prompt"))
            finally:
                self._scheduler.drop(job)
                settle()

        def stop() -> None:
            self._scheduler.stop(job)
            settle()

        return Stream(pieces(), outcome, stop)

    def _pieces(
        self, job: Job, answer: Answer, on_prompt: Callable[[int, int], None] | None
    ) -> Generator[str, None, None]:
        self._scheduler.submit(job)
        given, goes_on = 0, True
        while goes_on:
            goes_on = self._scheduler.advance(job)
            if on_prompt and goes_on and job.at_prompt:
                on_prompt(job.done, job.total)
            while given < len(answer.shown):  # which may have grown meanwhile
                given += 1
                yield answer.shown[given - 1]
        self._scheduler.keep(job)

    def chat(self, system: str | None = None, **options: Unpack[Options]) -> Chat:
        """A conversation. `options` are for all its turns; the model's authors say how to sample unless they do."""
        if self._chat_template is None:
            raise BadInput(
                f"{self.bundle.root} has no chat template",
                "It goes on with texts instead: pocketmoe run, or generate in Python.",
            )

        def stream(messages: Messages, on_end: Callable[[Generation], None], given: Mapping[str, Any]) -> Stream:
            return self._stream(messages, on_end, given)

        return Chat(stream, system, {"authors": True, **options})

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """A text's token ids. Raises BadInput."""
        return self._text.encode(text, add_special_tokens=add_special_tokens)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._text.decode(list(ids))

    def token_text(self, token: int) -> str:
        """The text of one token; the name of one that has no text, such as an end of text."""
        return self._text.decode([token]) or self._text.name(token)

    def prompt_ids(self, prompt: Prompt, *, raw: bool = False, template: Mapping[str, Any] | None = None) -> list[int]:
        """What `stream` makes of a prompt, however long. Raises BadInput."""
        return self._ids(prompt, raw, template)[0]

    def template_mentions(self, variable: str) -> bool:
        """Whether the chat template has that word: one that does not cannot depend on it."""
        return self._chat_template is not None and self._chat_template.mentions(variable)

    def logprobs(self, text: str | Sequence[int], top: int = 0) -> list[TokenLogprob]:
        """For each token of a text but the first, the model's log probability of it after those before, in nats.

        `top`: how many of the likeliest tokens to give beside. Raises ContextFull for a text that is too long.
        """
        ids = self.tokenize(text) if isinstance(text, str) else list(text)
        if len(ids) > self.context_length:
            raise ContextFull(len(ids), self.context_length, "the context")
        at_once = max(1, min(CHUNK, _LOGITS_BYTES // (4 * self.bundle.manifest.model.vocab_size)))
        found: list[TokenLogprob] = []

        def work() -> Work:
            for start in range(0, len(ids), at_once):
                rows = yield Ask(ids[start : start + at_once], "all")
                following = ids[start + 1 : start + 1 + len(rows)]
                found.extend(
                    token_logprob(log_softmax(row), token, top) for row, token in zip(rows, following, strict=False)
                )

        job = Job(work())
        self._scheduler.submit(job)
        try:
            while self._scheduler.advance(job):
                pass
        finally:
            self._scheduler.stop(job)
        return found

    @property
    def sequences(self) -> int:
        """How many texts are computed at once, at most."""
        return self.engine.at_once

    @property
    def active(self) -> int:
        """How many texts are being computed. Any thread may look at any time."""
        return self._scheduler.active

    @property
    def waiting(self) -> int:
        """How many calls wait until one of those has ended. Any thread may look at any time."""
        return self._scheduler.waiting

    @property
    def memory(self) -> dict[str, int]:
        """Bytes promised, by what for; with `budget`, and `peak` so far."""
        budget = self.engine.budget
        budget.observe()
        return {**budget.claims, "budget": budget.total_bytes, "peak": budget.peak_bytes}

    def resize(self, total_bytes: int) -> None:
        """Keep to another budget for the whole process; answers under way go on, and stay the same.

        Raises BadInput when it is closed, and BudgetTooSmall.
        """
        self.engine.resize(total_bytes, self._scheduler.between_steps, self._scheduler.idle)

    def activity(self) -> Activity:
        """What it has done so far, also while it answers; from any thread. Raises BadInput when it is closed."""
        return self.engine.activity()

    @property
    def sampling(self) -> Sampling:
        """How the model's authors sample."""
        return authors_sampling(self.bundle.manifest.sampling)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def close(self) -> None:
        """Give everything back. Answers that are not finished end with BadInput; a second time does nothing."""
        self._scheduler.close()
        engine, self._engine = self._engine, None
        if engine is None:
            return
        if self._counts:
            self._counts.add(engine.stats.expert_counts, self.bundle.manifest.moe_layers[0].top_k)
        engine.close()
        if self._prefixes:
            self._prefixes.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def engine(self) -> Engine:
        """What computes its answers. Raises BadInput once the model is closed."""
        if self._engine is None:
            raise BadInput("the model is closed", "Load it again.")
        return self._engine

    @property
    def prefixes(self) -> KeptPrefixes | None:
        """What is kept on disk of texts, where that was asked for."""
        return self._prefixes

    def _ids(self, prompt: Prompt, raw: bool, template: Mapping[str, Any] | None) -> tuple[list[int], str | None]:
        """A prompt's token ids, and what the chat template has made of it, where it was used."""
        if not len(prompt):
            raise BadInput("the prompt is empty", "Give some text.")
        if isinstance(prompt, str):
            if raw or self._chat_template is None:
                return self._text.encode(prompt), None
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt[0], int):
            return [*map(int, prompt)], None  # type: ignore[arg-type]
        if self._chat_template is None:
            raise BadInput(f"{self.bundle.root} has no chat template", "Give the text to be continued.")
        messages = for_template(prompt, self._text.dialect)  # type: ignore[arg-type]
        text = self._chat_template.render(messages, **(template or {}))
        return self._text.encode(text, add_special_tokens=False), text

    def _generation(self, answer: Answer, engine: Engine, begun: bool, spoken: Speech) -> Generation:
        budget = engine.budget
        budget.observe()
        before, used = answer.counts, Counts.of(engine.stats)
        wanted = used.wanted - before.wanted
        prompt = len(answer.prompt)
        return Generation(
            text=answer.text,
            tokens=tuple(answer.tokens),
            stop_reason=answer.stop_reason,
            prompt_tokens=prompt,
            reused_tokens=answer.reused_tokens,
            ttft_s=answer.ttft_s,
            decode_tokens_per_s=answer.decode_tokens_per_s,
            total_s=answer.last - answer.began,
            expert_hit_rate=(used.hits - before.hits) / wanted if wanted else None,
            bytes_read=used.bytes_read - before.bytes_read,
            peak_memory_bytes=budget.peak_bytes,
            memory_budget_bytes=budget.total_bytes,
            context_used=prompt + len(answer.tokens),
            context_length=self.context_length,
            sampling=answer.asked.sampling,
            logprobs=tuple(answer.logprobs) if answer.logprobs else None,
            reasoning_begun=begun,
            constraint=answer.asked.constraint.kind if answer.asked.constraint else None,
            speech=spoken,
        )
