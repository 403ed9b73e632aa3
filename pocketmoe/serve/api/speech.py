"""What all APIs say of tools and forms of answers, and the text of an answer's parts."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from pocketmoe.errors import BadInput
from pocketmoe.grammar.constraint import constraint
from pocketmoe.serve.api.decoding import plain
from pocketmoe.serve.api.errors import refused, translated
from pocketmoe.tools.calls import Part, Text, ToolCall, read_tools

Name = Annotated[str, Meta(pattern=r"\A[a-zA-Z0-9_.:/-]{1,128}\Z")]

Effort = Annotated[str, Meta(min_length=1, max_length=32)]  # of reasoning, in a word that the chat template knows


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


def tool_options(tools: Sequence[Function], choice: str | FunctionName | None, several: bool | None) -> dict[str, Any]:
    """Options of `Model.stream`. Raises ApiError for a choice that there is not."""
    options: dict[str, Any] = {}
    if tools:
        options["tools"] = [{"type": "function", "function": plain(tool)} for tool in tools]
        try:
            read_tools(options["tools"])
        except BadInput as error:
            raise translated(error, "tools") from error
    if isinstance(choice, FunctionName):
        if all(tool.name != choice.name for tool in tools):
            raise refused("tool_choice", f"there is no tool {choice.name!r} in 'tools'")
        options["tool_choice"] = {"type": "function", "function": plain(choice)}
        options["parallel_tool_calls"] = False  # one that is named is called once, unless more is said
    elif choice is not None:
        if choice == "required" and not tools:
            raise refused("tool_choice", "a call is required, and there are no 'tools'")
        options["tool_choice"] = choice
    if several is not None:
        options["parallel_tool_calls"] = several
    return options


def held_schema(schema: dict[str, Any], param: str) -> dict[str, Any]:
    """What an answer is to be held to. Raises ApiError for a schema that cannot be held."""
    try:
        constraint(json_schema=schema)
    except BadInput as error:
        raise translated(error, param) from error
    return schema


def refuse_loose_results(messages: Sequence[Mapping[str, Any]], param: str) -> None:
    """Raise ApiError unless each call is answered by what follows it, once, and each result is of such a call.

    `messages`: as chat templates take them.
    """
    waiting: list[str] = []  # calls without a result
    for message in messages:
        if message["role"] == "tool":
            call = message.get("tool_call_id")
            if call not in waiting:
                raise refused(param, f"there is a result of the call {call!r}, which is not one of those before it")
            waiting.remove(call)
            continue
        if waiting:
            break
        waiting = [call["id"] for call in message.get("tool_calls", ())]
    if waiting:
        raise refused(param, f"there is no result of the call {waiting[0]!r} right after it")


def text_of(parts: list[Part], kind: str) -> str:
    """The content, or the reasoning."""
    return "".join(part.text for part in parts if isinstance(part, Text) and part.kind == kind)


def call_id(call: ToolCall) -> str:
    """The model's own, or a new one."""
    return call.id or f"call_{uuid.uuid4().hex[:24]}"
