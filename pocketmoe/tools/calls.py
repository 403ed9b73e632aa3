"""Records: a tool, a call, the parts of an answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pocketmoe.errors import BadInput
from pocketmoe.grammar.json_schema import read_schema
from pocketmoe.jsonfile import is_array, is_object

_MOST_TOOLS = 512
_REMEDY = 'Give tools as OpenAI has them: {"type": "function", "function": {"name": ..., "parameters": {...}}}.'


@dataclass(frozen=True)
class Tool:
    """A function that a model may call. `parameters`: a JSON schema of an object.

    `held`: what a grammar holds its arguments to, which is any object where the schema has what cannot be held.
    """

    name: str
    parameters: Mapping[str, Any]
    held: Mapping[str, Any] = field(default_factory=lambda: {"type": "object"})

    @property
    def properties(self) -> Mapping[str, Any]:
        """The schema of each parameter."""
        found = self.parameters.get("properties")
        return found if is_object(found) else {}

    @property
    def ordered(self) -> Sequence[str]:
        """The names of the parameters, as the schema has them."""
        return [*self.properties]

    def held_parameter(self, name: str) -> Mapping[str, Any]:
        """What a grammar holds a parameter to, with what its schema refers to."""
        found: Any = self.held.get("properties", {}).get(name)
        if not is_object(found):  # of a schema that cannot be held as a whole
            kind: Any = self.properties.get(name)
            return {"type": kind["type"]} if is_object(kind) and isinstance(kind.get("type"), str) else {}
        definitions = {key: self.held[key] for key in ("$defs", "definitions") if key in self.held}
        return {**definitions, **found}

    @property
    def required(self) -> Sequence[str]:
        found = self.parameters.get("required")
        return [str(name) for name in found] if is_array(found) else []


@dataclass(frozen=True)
class ToolCall:
    """`arguments`: the text of a JSON object. `id`: where the model gives one."""

    name: str
    arguments: str
    id: str | None = None

    @classmethod
    def of(cls, name: str, arguments: Mapping[str, Any], id: str | None = None) -> ToolCall:  # noqa: A002
        return cls(name, json.dumps(arguments, ensure_ascii=False), id)


Tools = Sequence[Tool]
Calls = list[ToolCall] | None  # of a section; None where it is malformed


@dataclass(frozen=True)
class Text:
    """A piece of an answer: of what the model says, or of its reasoning."""

    kind: Literal["content", "reasoning"]
    text: str


Part = Text | ToolCall


@dataclass(frozen=True)
class Parsed:
    """A whole answer."""

    content: str
    reasoning: str
    calls: tuple[ToolCall, ...]

    @classmethod
    def of(cls, parts: Iterable[Part]) -> Parsed:
        """The parts of an answer, put together."""
        found = [*parts]
        texts = [part for part in found if isinstance(part, Text)]
        return cls(
            "".join(part.text for part in texts if part.kind == "content"),
            "".join(part.text for part in texts if part.kind == "reasoning"),
            tuple(part for part in found if isinstance(part, ToolCall)),
        )


def read_tools(tools: Sequence[Any]) -> list[Tool]:
    """Tools as OpenAI has them: functions, with a name and a JSON schema. Raises BadInput for anything else."""
    if len(tools) > _MOST_TOOLS:
        raise BadInput(f"{len(tools)} tools are more than {_MOST_TOOLS}", "Give fewer.")
    found: list[Tool] = []
    for tool in tools:
        function = tool.get("function") if is_object(tool) else None
        name = function.get("name") if is_object(function) else None
        if not is_object(function) or not isinstance(name, str) or not name:
            raise BadInput("a tool is no function with a name", _REMEDY)
        parameters: Any = function.get("parameters") or {"type": "object", "properties": {}}
        if not is_object(parameters):
            raise BadInput(f"the parameters of the tool {name!r} are no JSON schema", _REMEDY)
        found.append(Tool(name, parameters, _held(parameters, strict=function.get("strict") is True)))
    names = [tool.name for tool in found]
    if len({*names}) < len(names):
        raise BadInput("two tools have the same name", "Name each its own.")
    return found


def _held(parameters: Mapping[str, Any], strict: bool) -> Mapping[str, Any]:
    """What a grammar can hold arguments to. Raises BadInput for what cannot be held where that was asked for."""
    try:
        return {"type": "object", **read_schema(dict(parameters))}
    except BadInput:
        if strict:
            raise
        return {"type": "object"}
