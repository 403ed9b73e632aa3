"""Tools as OpenAI has them, and the parts of an answer: content, reasoning, calls."""

from __future__ import annotations

import uuid
from typing import Annotated, Any, Literal, Protocol

from msgspec import Meta, Struct

from pocketmoe.runtime import marks
from pocketmoe.runtime.conversation import Outcome
from pocketmoe.runtime.marks import Reasoning
from pocketmoe.serve.api.decoding import plain
from pocketmoe.tools.calls import Part, Text, ToolCall

Name = Annotated[str, Meta(min_length=1, max_length=128)]


class Function(Struct, forbid_unknown_fields=True):
    """What a model may call. `parameters`: a JSON schema of an object."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(Struct, forbid_unknown_fields=True):
    function: Function
    type: Literal["function"] = "function"


class FunctionName(Struct, forbid_unknown_fields=True):
    name: Name


class NamedTool(Struct, forbid_unknown_fields=True):
    function: FunctionName
    type: Literal["function"] = "function"


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class CalledFunction(Struct, forbid_unknown_fields=True):
    name: Name
    arguments: str


class Call(Struct, forbid_unknown_fields=True):
    """A call of an earlier answer."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


def tool_options(tools: list[FunctionTool] | None, choice: ToolChoice | None, several: bool | None) -> dict[str, Any]:
    """Options of `Model.stream`."""
    options: dict[str, Any] = {}
    if tools:
        options["tools"] = plain(tools)
    if choice is not None:
        options["tool_choice"] = choice if isinstance(choice, str) else choice.function.name
    if several is not None:
        options["parallel_tool_calls"] = several
    return options


class Parts(Protocol):
    """Takes an answer's text in pieces and gives its parts."""

    def push(self, piece: str) -> list[Part]: ...

    def finish(self) -> list[Part]: ...


class PlainParts:
    """Text, with reasoning between <think> and </think> at most."""

    def __init__(self, begun: bool) -> None:
        """`begun`: the prompt has opened the reasoning."""
        self._reasoning = Reasoning(begun)

    def push(self, piece: str) -> list[Part]:
        return [
            Text("reasoning" if part.is_reasoning else "content", part.text) for part in self._reasoning.push(piece)
        ]

    def finish(self) -> list[Part]:
        return [*map(_text, self._reasoning.finish())]


def _text(part: marks.Part) -> Text:
    return Text("reasoning" if part.is_reasoning else "content", part.text)


def parts_of(known: Outcome) -> Parts:
    """What reads an answer."""
    if known.speech.is_plain:
        return PlainParts(known.reasoning_begun)
    return known.speech.parser(known.reasoning_begun)


def text_of(parts: list[Part], kind: str) -> str:
    """The content, or the reasoning."""
    return "".join(part.text for part in parts if isinstance(part, Text) and part.kind == kind)


def call_id(call: ToolCall) -> str:
    """The model's own, or a new one."""
    return call.id or f"call_{uuid.uuid4().hex[:24]}"
