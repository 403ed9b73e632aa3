"""A conversation that keeps its text, and what a model has to offer for that."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pocketmoe.bundle.files import read_text, write_whole
from pocketmoe.errors import BadInput
from pocketmoe.grammar.constraint import Kind
from pocketmoe.runtime.answer import StopReason, TokenLogprob
from pocketmoe.runtime.sampling import Sampling
from pocketmoe.tools.calls import Parsed, ToolCall
from pocketmoe.tools.speech import Speech

Messages = Sequence[Mapping[str, Any]]
FORMAT = 1
_MOST_BYTES = 4 << 20  # read at once, within the budget
_REMEDY = "Give a file that `save` has written."


@dataclass(frozen=True)
class Generation:
    """An answer and what it took."""

    text: str
    tokens: tuple[int, ...]  # ids, an end of text and what a stop string cut off included
    # eos; complete: nothing can follow in what it is held to; stop: a stop string; length: max_tokens; context: no room
    # is left; stopped: closed
    stop_reason: StopReason
    prompt_tokens: int
    reused_tokens: int  # of the prompt: computed for an earlier text that begins alike
    ttft_s: float  # from the prompt to the first token
    decode_tokens_per_s: float | None  # None with fewer than two tokens
    total_s: float
    expert_hit_rate: float | None  # of this answer's experts, in memory when they were wanted; None: none were
    bytes_read: int  # for this answer
    peak_memory_bytes: int  # of the process since the model was loaded
    memory_budget_bytes: int
    context_used: int  # tokens of prompt and answer
    context_length: int  # the most that these may be
    sampling: Sampling  # how tokens were chosen
    logprobs: tuple[TokenLogprob, ...] | None = None
    reasoning_begun: bool = False  # the prompt has opened the model's reasoning already
    constraint: Kind | None = None  # what the text is held to, as far as it goes where it was cut off
    speech: Speech = field(default_factory=Speech)  # how the text is read

    @property
    def is_whole(self) -> bool:
        """Whether the text came to its own end: cut off, it need not be what it is held to."""
        return self.stop_reason in ("eos", "complete")

    @property
    def reasoning(self) -> str:
        """What the model thought before it answered, where it marks that: between <think> and </think>, for example."""
        return self._parsed.reasoning

    @property
    def content(self) -> str:
        """The text without its reasoning and without calls."""
        return self._parsed.content

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls of tools that it was given."""
        return self._parsed.calls

    @property
    def _parsed(self) -> Parsed:
        return self.speech.parse(self.text, self.reasoning_begun)


@dataclass
class Outcome:
    """What an answer comes to; where its maker and its `Stream` meet."""

    prompt_tokens: int = 0
    reasoning_begun: bool = False  # the prompt has opened the model's reasoning already
    tokens: Sequence[int] = ()  # ids so far
    speech: Speech = field(default_factory=Speech)  # whose parser reads the pieces
    logprobs: Sequence[TokenLogprob] = ()  # of those, where they are wanted
    result: Generation | None = None  # once it has ended


class Stream:
    """An iterator over the pieces of an answer. Closing it, or leaving its `with` block, stops the work."""

    def __init__(self, pieces: Generator[str, None, None], outcome: Outcome, stop: Callable[[], None]) -> None:
        """`pieces` and `stop` fill `outcome`, and know nothing of this object: dropped, it is closed at once."""
        self._pieces = pieces
        self._outcome = outcome
        self._stop = stop

    @property
    def result(self) -> Generation:
        """The whole answer, or what there was of it when the stream was closed. Raises BadInput before that."""
        if self._outcome.result is None:
            raise BadInput("the answer has not ended", "Take all its pieces, or close it, first.")
        return self._outcome.result

    @property
    def so_far(self) -> Outcome:
        """What is known already: of the prompt at once, of the answer as its tokens come."""
        return self._outcome

    @property
    def has_result(self) -> bool:
        """False before the end, and after it where not one token was computed."""
        return self._outcome.result is not None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop here. Also from another thread than the one that takes the pieces, for which they then end."""
        self._stop()
        with contextlib.suppress(ValueError):  # it is in the middle of one
            self._pieces.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


Streamer = Callable[[Messages, Callable[[Generation], None], Mapping[str, Any]], Stream]


class Chat:
    """A conversation. Its text is `messages`: dicts with `role` and `content`, which may be changed between turns.

    The model keeps what it has computed of the last text, so that a turn costs its new tokens, and those of the answer
    before, again, as part of the prompt.
    """

    def __init__(self, stream: Streamer, system: str | None = None, options: Mapping[str, Any] | None = None) -> None:
        """`options`: what `Model.stream` takes beside the prompt, for every turn that does not say otherwise."""
        self._stream = stream
        self.options = dict(options or {})
        self.messages: list[dict[str, Any]] = []
        if system:
            self.messages.append({"role": "system", "content": system})

    def stream(self, text: str, **options: Any) -> Stream:
        """Say something; the pieces of the answer. Both become part of the conversation when the answer ends.

        An answer that is closed early stays as far as it came. What fails leaves the conversation as it was.
        """
        asked = [*self.messages, {"role": "user", "content": text}]

        def keep(result: Generation) -> None:
            self.messages[:] = [*asked, _answer(result)]

        return self._stream(asked, keep, {**self.options, **options})

    def say(self, text: str, **options: Any) -> Generation:
        """Say something; the whole answer."""
        with self.stream(text, **options) as stream:
            for _ in stream:
                pass
            return stream.result

    def undo(self) -> str | None:
        """Take back the last turn; returns what was said, None where nothing was."""
        said = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        if not said:
            return None
        text = self.messages[said[-1]]["content"]
        del self.messages[said[-1] :]
        return str(text)

    def reset(self) -> None:
        """Begin anew, with the same system message."""
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]

    def fork(self) -> Chat:
        """A conversation of its own that begins like this one."""
        other = Chat(self._stream, options=self.options)
        other.messages = [dict(message) for message in self.messages]
        return other

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the text to a file that only its owner may read. Raises OutputError."""
        text = json.dumps({"pocketmoe_chat": FORMAT, "messages": self.messages}, ensure_ascii=False, indent=1)
        write_whole(Path(path), text.encode("utf-8", "surrogatepass"), mode=0o600)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from a saved text in the place of this one. Raises BadInput, and then changes nothing."""
        self.messages = read_conversation(Path(path))


def read_conversation(path: Path) -> list[dict[str, Any]]:
    """The messages that `Chat.save` has written to a file. Raises BadInput."""
    try:
        found = json.loads(read_text(path, _REMEDY, _MOST_BYTES))
        known = found["pocketmoe_chat"] == FORMAT
        messages = [dict(message) for message in found["messages"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadInput(f"{path} is not a saved conversation", _REMEDY) from error
    if not known or not all(_is_message(message) for message in messages):
        raise BadInput(f"{path} is not a saved conversation of this version", _REMEDY)
    return messages


def _is_message(message: dict[str, Any]) -> bool:
    return all(isinstance(message.get(name), str) for name in ("role", "content"))


def _answer(result: Generation) -> dict[str, Any]:
    reasoning = {"reasoning_content": result.reasoning} if result.reasoning else {}
    return {"role": "assistant", "content": result.content, **reasoning}
