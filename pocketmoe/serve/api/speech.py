"""Tools as OpenAI has them, and the text of an answer's parts."""

from __future__ import annotations

import uuid
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

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


def text_of(parts: list[Part], kind: str) -> str:
    """The content, or the reasoning."""
    return "".join(part.text for part in parts if isinstance(part, Text) and part.kind == kind)


def call_id(call: ToolCall) -> str:
    """The model's own, or a new one."""
    return call.id or f"call_{uuid.uuid4().hex[:24]}"
