"""What an API asks of a model, and what happens while it is answered: where all APIs meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pocketmoe.errors import ContextFull, PocketMoEError
from pocketmoe.runtime.answer import TokenLogprob
from pocketmoe.runtime.conversation import Generation
from pocketmoe.runtime.model import Model, Prompt
from pocketmoe.tools.families import Parser

MOST_CHOICES = 128  # answers to one request


@dataclass(frozen=True)
class Work:
    """Prompts to be answered by one model, `n` times each."""

    model: str
    prompts: Sequence[Prompt]
    param: str  # the field that holds the prompts
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])  # of `Model.stream`
    n: int = 1
    score: int | None = None  # also how likely the prompt's own tokens are, with so many likeliest ones
    answers: bool = True  # False: the prompt is only scored
    variables: Mapping[str, str] = field(default_factory=dict[str, str])  # of the template: the field that sets each

    def at_fault(self, error: PocketMoEError) -> str | None:
        """The field that an error is about; None where it may as well be a schema's, or that of tools."""
        is_held = not {"json_schema", "tools"}.isdisjoint(self.options)
        return None if is_held and not isinstance(error, ContextFull) else self.param


@dataclass(frozen=True)
class Question:
    """Something that a model can tell at once. `answer` is called in a thread."""

    model: str
    param: str  # the field that it is about
    answer: Callable[[Model], Any]


@dataclass(frozen=True)
class Choice:
    """An answer that is about to be computed."""

    index: int
    prompt_tokens: int
    parser: Parser  # what reads it


@dataclass(frozen=True)
class Progress:
    """So many tokens of a prompt are computed."""

    index: int
    done: int
    total: int


@dataclass(frozen=True)
class Piece:
    """Some text of an answer, and what came with it."""

    index: int
    text: str
    tokens: Sequence[int]  # that have come since the last piece
    logprobs: Sequence[TokenLogprob]  # of those, where they are wanted


@dataclass(frozen=True)
class Ended:
    """An answer is complete."""

    index: int
    result: Generation


@dataclass(frozen=True)
class Scored:
    """How likely a prompt's own tokens are: `logprobs` of all but the first."""

    index: int
    tokens: Sequence[int]
    logprobs: Sequence[TokenLogprob]


Event = Progress | Piece | Ended | Scored


class Reply(Protocol):
    """How an API tells what happens: made for one request, once its prompts are accepted."""

    streams: bool

    def begin(self, model: Model, choices: Sequence[Choice]) -> Iterator[bytes]:
        """What is sent first, where the answer is streamed."""
        ...

    def push(self, event: Event) -> Iterator[bytes]:
        """What is sent of an event; all of them come here, streamed or not."""
        ...

    def end(self) -> Iterator[bytes]:
        """What is sent last."""
        ...

    def whole(self) -> Any:
        """The answer as one object, where it is not streamed."""
        ...

    def failed(self, error: Exception) -> bytes:
        """What is sent when it fails on the way."""
        ...
