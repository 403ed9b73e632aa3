"""OpenAI's completions: /v1/completions. A text, or its token ids, is continued as it is; `echo` scores it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from msgspec import Meta

from pocketmoe.runtime.answer import TokenLogprob
from pocketmoe.runtime.conversation import Generation
from pocketmoe.runtime.model import Model, Prompt
from pocketmoe.serve.api.chat import FINISH, finite, usage
from pocketmoe.serve.api.decoding import decode
from pocketmoe.serve.api.errors import refused, translated
from pocketmoe.serve.api.sampling import DONE, Sampled, TokenId, event, sampling_options
from pocketmoe.serve.api.work import MOST_CHOICES, Choice, Event, Piece, Progress, Scored, Work

DEFAULT_TOKENS = 16  # OpenAI's
Text = Annotated[str, Meta(min_length=1)]
Ids = Annotated[list[TokenId], Meta(min_length=1)]
Texts = Annotated[list[Text | Ids | TokenId], Meta(min_length=1)]  # several texts, several lists of ids, or one list


class CompletionRequest(Sampled, kw_only=True, forbid_unknown_fields=True):
    """Texts to be continued."""

    prompt: Text | Texts
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None  # 0: with `echo`, to score the prompt alone
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    best_of: Annotated[int, Meta(ge=1, le=1)] | None = None  # more than one is not supported
    suffix: None = None  # likewise any


def read(body: bytes) -> tuple[Work, CompletionReply]:
    """A request, and how it is answered. Raises ApiError."""
    request = decode(body, CompletionRequest)
    prompts = _prompts(request.prompt)
    n = request.n or 1
    if len(prompts) * n > MOST_CHOICES:
        raise refused("n", f"more than {MOST_CHOICES} answers to one request are not supported")
    options = sampling_options(request)
    most = DEFAULT_TOKENS if request.max_tokens is None else request.max_tokens
    if most == 0 and not request.echo:
        raise refused("max_tokens", "an answer of 0 tokens is none; with 'echo' it scores the prompt")
    options |= {"max_tokens": max(1, most), "raw": True}
    if request.logprobs is not None:
        options["logprobs"] = request.logprobs
    score = request.logprobs if request.echo else None
    work = Work(request.model, prompts, "prompt", options, n, score, answers=most > 0)
    return work, CompletionReply(request, prompts, n)


def _prompts(given: str | Sequence[Any]) -> list[Prompt]:
    """One prompt or several, of which a list of ids is one."""
    if isinstance(given, str):
        return [given]
    kinds: set[type] = {type(item) for item in given}
    if len(kinds) > 1:
        raise refused("prompt", "give a text, a list of token ids, or several of one of them")
    return [[*given]] if kinds == {int} else [*given]


class CompletionReply:
    """Tells an answer as `text_completion`, whole or in pieces."""

    def __init__(self, request: CompletionRequest, prompts: Sequence[Prompt], n: int) -> None:
        self.streams = bool(request.stream)
        self._usage = bool(request.stream_options and request.stream_options.include_usage)
        self._ids, self._echo = bool(request.return_token_ids), bool(request.echo)
        self._wants_logprobs = request.logprobs is not None
        self._prompts, self._n = prompts, n
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": request.model,
        }
        self._model: Model | None = None
        self._choices: Sequence[Choice] = ()
        self._texts: dict[int, str] = {}
        self._told: dict[int, Logprobs] = {}
        self._results: dict[int, Generation] = {}

    def begin(self, model: Model, choices: Sequence[Choice]) -> Iterator[bytes]:
        self._model, self._choices = model, choices
        for choice in choices:
            echoed = self._echoed(choice.index) if self._echo else ""
            self._texts[choice.index], self._told[choice.index] = echoed, Logprobs(model)
            if echoed and self.streams and not self._wants_logprobs:
                yield self._chunk(choice.index, echoed)

    def _echoed(self, index: int) -> str:
        assert self._model is not None
        prompt = self._prompts[index // self._n]
        return prompt if isinstance(prompt, str) else self._model.detokenize(prompt)  # type: ignore[arg-type]

    def push(self, event: Event) -> Iterator[bytes]:
        if isinstance(event, Progress):
            yield f": prompt {event.done}/{event.total}\n\n".encode()
        elif isinstance(event, Scored):
            logprobs = self._told[event.index].of_prompt(event.tokens, event.logprobs)
            yield self._chunk(event.index, self._texts[event.index], logprobs)
        elif isinstance(event, Piece):
            self._texts[event.index] += event.text
            logprobs = self._told[event.index].add(event.logprobs) if self._wants_logprobs else None
            yield self._chunk(event.index, event.text, logprobs, event.tokens)
        else:
            self._results[event.index] = event.result
            yield self._chunk(event.index, "", finish=FINISH.get(event.result.stop_reason, "stop"))

    def end(self) -> Iterator[bytes]:
        if self._usage:
            yield event({**self._head, "choices": [], "usage": self._all_usage()})
        yield DONE

    def whole(self) -> dict[str, Any]:
        choices = [self._whole_choice(choice.index) for choice in self._choices]
        return {**self._head, "choices": choices, "usage": self._all_usage()}

    def failed(self, error: Exception) -> bytes:
        return event(translated(error).body("openai"))

    def _whole_choice(self, index: int) -> dict[str, Any]:
        result = self._results.get(index)
        choice: dict[str, Any] = {
            "index": index,
            "text": self._texts[index],
            "logprobs": self._told[index].told if self._wants_logprobs else None,
            "finish_reason": FINISH.get(result.stop_reason, "stop") if result else "length",
        }
        if self._ids:
            choice["token_ids"] = list(result.tokens) if result else []
        return choice

    def _chunk(
        self,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None = None,
        tokens: Sequence[int] = (),
        finish: str | None = None,
    ) -> bytes:
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        if tokens and self._ids:
            choice["token_ids"] = list(tokens)
        chunk: dict[str, Any] = {**self._head, "choices": [choice]}
        if self._usage:
            chunk["usage"] = None
        return event(chunk)

    def _all_usage(self) -> dict[str, Any]:
        """A prompt that is answered several times counts once."""
        first = self._choices[:: self._n]
        prompt = sum(choice.prompt_tokens for choice in first)
        found = usage(self._results.values())
        cached = [self._results[choice.index].reused_tokens for choice in first if choice.index in self._results]
        return {
            **found,
            "prompt_tokens": prompt,
            "total_tokens": prompt + found["completion_tokens"],
            "prompt_tokens_details": {"cached_tokens": sum(cached)},
        }


class Logprobs:
    """Log probabilities as completions have them: four lists, a token each."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._length = 0  # characters so far
        self.told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def of_prompt(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
        """Those of a prompt's tokens, of which the first has none."""
        return self._note([(tokens[0], None, None), *map(self._entry, logprobs)])

    def add(self, logprobs: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
        """Those of further tokens."""
        return self._note([*map(self._entry, logprobs)])

    def _entry(self, each: TokenLogprob) -> tuple[int, float, dict[str, float]]:
        top: dict[str, float] = {}
        for token, logprob in each.top:  # where two tokens have one text, the likelier one is told
            top.setdefault(self._model.token_text(token), finite(logprob))
        return each.token, finite(each.logprob), top

    def _note(self, entries: Sequence[tuple[int, float | None, dict[str, float] | None]]) -> dict[str, list[Any]]:
        new: dict[str, list[Any]] = {name: [] for name in self.told}
        for token, logprob, top in entries:
            text = self._model.token_text(token)
            for name, value in zip(new, (text, logprob, top, self._length), strict=True):
                new[name].append(value)
            self._length += len(text)
        for name, values in new.items():
            self.told[name] += values
        return new
