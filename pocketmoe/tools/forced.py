"""Grammars that let a model write nothing but calls, in its family's form and with arguments as the tools have them.

They are rules in llguidance's form of Lark. Marks that are special tokens of a model are given as such, by `term`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pocketmoe.errors import BadInput
from pocketmoe.grammar.constraint import WHITESPACE
from pocketmoe.jsonfile import is_array, is_object
from pocketmoe.tools.calls import Tool
from pocketmoe.tools.families import Dialect

Term = Callable[[str], str]  # a mark as a grammar has it
Schema = Mapping[str, Any]


class _Rules:
    """Rules of a grammar, as they are made."""

    def __init__(self, term: Term, several: bool) -> None:
        self.term, self.several = term, several
        self.lines: list[str] = []

    def add(self, body: str, options: str = "") -> str:
        """A new rule's name."""
        name = f"r{len(self.lines)}"
        self.lines.append(f"{name}{options}: {body}")
        return name

    def text(self, *parts: str) -> str:
        """Marks and text, one after the other."""
        return " ".join(self.term(part) for part in parts if part)

    def json(self, schema: Schema) -> str:
        return self.add(f"%json {json.dumps({'x-guidance': {'whitespace_pattern': WHITESPACE}, **schema})}")

    def one_of(self, rules: Sequence[str]) -> str:
        return self.add(" | ".join(rules))

    def repeated(self, rule: str, between: str = "") -> str:
        """One or, where there may be several, more of it."""
        if not self.several:
            return rule
        return f"{rule} ({json.dumps(between)} {rule})*" if between else f"{rule}+"

    def until(self, end: str) -> str:
        """Any text, and then `end`."""
        return self.add("/(?s:.*)/", f"[suffix={json.dumps(end)}]")


def forced_calls(spoken: Dialect, tools: Sequence[Tool], term: Term, *, several: bool = True) -> str:
    """The rules, `start` first, of an answer that is one call, or `several`.

    Raises BadInput for a model whose template knows no tools.
    """
    family = spoken.family
    if family is None:
        raise BadInput("this model's chat template knows no tools", "Leave it to the model: tool_choice auto.")
    if not tools:
        raise BadInput("there are no tools to be called", "Give some.")
    rules = _Rules(term, several)
    start = _FORMS[family.name](rules, tools)
    return "\n".join([f"start: {start}", *rules.lines])


def _objects(tools: Sequence[Tool], key: str = "arguments") -> dict[str, Any]:
    """A schema of calls as objects: the name, and the arguments under `key`."""
    choices = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, key: {"$ref": f"#/$defs/{number}"}},
            "required": ["name", key],
            "additionalProperties": False,
        }
        for number, tool in enumerate(tools)
    ]
    return {"anyOf": choices, "$defs": _definitions(tools)}


def _definitions(tools: Sequence[Tool]) -> dict[str, Any]:
    return {str(number): _moved(tool.held, f"#/$defs/{number}") for number, tool in enumerate(tools)}


def _moved(schema: Any, place: str) -> Any:
    """A schema that stands at another place than the root, to which its references refer."""
    if is_array(schema):
        return [_moved(item, place) for item in schema]
    if not is_object(schema):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    reference = schema.get("$ref")
    return {**moved, "$ref": place + reference[1:]} if isinstance(reference, str) and reference[:1] == "#" else moved


def _list(opening: str, closing: str) -> Callable[[_Rules, Sequence[Tool]], str]:
    def form(rules: _Rules, tools: Sequence[Tool]) -> str:
        most = {} if rules.several else {"maxItems": 1}
        calls = _objects(tools)
        array = {"type": "array", "items": {"anyOf": calls["anyOf"]}, "minItems": 1, **most, "$defs": calls["$defs"]}
        return f"{rules.text(opening)} {rules.json(array)} {rules.text(closing) if closing else ''}"

    return form


def _hermes(rules: _Rules, tools: Sequence[Tool]) -> str:
    body = rules.json(_objects(tools))
    call = rules.add(
        f"{rules.text('<tool_call>')} {json.dumps(chr(10))} {body} {json.dumps(chr(10))} {rules.text('</tool_call>')}"
    )
    return rules.repeated(call, "\n")


def _each(rules: _Rules, tools: Sequence[Tool], before: Callable[[Tool], str], after: str) -> str:
    """A rule for the call of any tool: what is before its arguments, they as JSON, what is after them."""
    calls = [rules.add(f"{before(tool)} {rules.json(tool.held)} {after}") for tool in tools]
    return rules.one_of(calls)


def _mistral_names(rules: _Rules, tools: Sequence[Tool]) -> str:
    call = _each(
        rules, tools, lambda tool: f"{rules.text('[TOOL_CALLS]')} {json.dumps(tool.name)} {rules.text('[ARGS]')}", ""
    )
    return rules.repeated(call)


def _deepseek(rules: _Rules, tools: Sequence[Tool]) -> str:
    begin, sep, end = (rules.text(f"<｜tool▁{word}｜>") for word in ("call▁begin", "sep", "call▁end"))
    call = _each(
        rules,
        tools,
        lambda tool: f'{begin} "function" {sep} {json.dumps(tool.name + chr(10) + "```json" + chr(10))}',
        f"{json.dumps(chr(10) + '```')} {end}",
    )
    return (
        f"{rules.text('<｜tool▁calls▁begin｜>')} {rules.repeated(call, chr(10))} {rules.text('<｜tool▁calls▁end｜>')}"
    )


def _deepseek_v31(rules: _Rules, tools: Sequence[Tool]) -> str:
    begin, sep, end = (rules.text(f"<｜tool▁{word}｜>") for word in ("call▁begin", "sep", "call▁end"))
    call = _each(rules, tools, lambda tool: f"{begin} {json.dumps(tool.name)} {sep}", end)
    return f"{rules.text('<｜tool▁calls▁begin｜>')} {rules.repeated(call)} {rules.text('<｜tool▁calls▁end｜>')}"


def _kimi(rules: _Rules, tools: Sequence[Tool]) -> str:
    begin, argument, end = (rules.text(f"<|tool_call_{word}|>") for word in ("begin", "argument_begin", "end"))
    call = _each(rules, tools, lambda tool: f"{begin} {json.dumps(f'functions.{tool.name}:')} /[0-9]/ {argument}", end)
    section = [rules.text(f"<|tool_calls_section_{word}|>") for word in ("begin", "end")]
    return f"{section[0]} {rules.repeated(call)} {section[1]}"


def _harmony(rules: _Rules, tools: Sequence[Tool]) -> str:
    return _each(
        rules,
        tools,
        lambda tool: (
            f"{rules.text('<|channel|>')} {json.dumps(f'commentary to=functions.{tool.name} ')} "
            f'{rules.text("<|constrain|>")} "json" {rules.text("<|message|>")}'
        ),
        rules.text("<|call|>"),
    )


def _llama(rules: _Rules, tools: Sequence[Tool]) -> str:
    return rules.repeated(rules.json(_objects(tools, "parameters")), "; ")


def _pythonic(opening: str, closing: str) -> Callable[[_Rules, Sequence[Tool]], str]:
    def call(rules: _Rules, tool: Tool) -> str:
        given = {
            name: rules.add(f"{json.dumps(f'{name}=')} {rules.json(tool.held_parameter(name))}")
            for name in tool.ordered
        }
        first = [given[name] for name in tool.ordered if name in tool.required]
        others = [given[name] for name in tool.ordered if name not in tool.required]
        if not first and others:
            optional = "".join(f' (", " {rule})?' for rule in others[1:])
            return rules.add(f'{json.dumps(f"{tool.name}(")} ({others[0]}{optional})? ")"')
        needed = ' ", " '.join(first)
        optional = "".join(f' (", " {rule})?' for rule in others)
        return rules.add(f'{json.dumps(f"{tool.name}(")} {needed}{optional} ")"')

    def form(rules: _Rules, tools: Sequence[Tool]) -> str:
        one = rules.one_of([call(rules, tool) for tool in tools])
        marks = [rules.text(mark) if mark else "" for mark in (opening, closing)]
        return f'{marks[0]} "[" {rules.repeated(one, ", ")} "]" {marks[1]}'

    return form


def _tagged(rules: _Rules, tool: Tool, head: str, before: Callable[[str], str], after: str, tail: str) -> str:
    """A call with a tag for each parameter, those that must be given and those that may, in the schema's order."""
    parts: list[str] = []
    for name in tool.ordered:
        schema = tool.held_parameter(name)
        value = (
            rules.until(after)
            if schema.get("type") == "string" and "enum" not in schema
            else _value(rules, schema, after)
        )
        part = rules.add(f"{json.dumps(before(name))} {value}")
        parts.append(part if name in tool.required else f"{part}?")
    return rules.add(" ".join([json.dumps(head), *parts, json.dumps(tail)]))


def _value(rules: _Rules, schema: Schema, after: str) -> str:
    choices = schema.get("enum")
    if choices and all(isinstance(choice, str) for choice in choices):
        return f"({' | '.join(json.dumps(choice, ensure_ascii=False) for choice in choices)}) {json.dumps(after)}"
    return f"{rules.json(schema)} {json.dumps(after)}"


def _qwen_coder(rules: _Rules, tools: Sequence[Tool]) -> str:
    calls = [
        _tagged(
            rules,
            tool,
            f"\n<function={tool.name}>\n",
            lambda name: f"<parameter={name}>\n",
            "\n</parameter>\n",
            "</function>\n",
        )
        for tool in tools
    ]
    call = rules.add(f"{rules.text('<tool_call>')} {rules.one_of(calls)} {rules.text('</tool_call>')}")
    return rules.repeated(call, "\n")


def _minimax(rules: _Rules, tools: Sequence[Tool]) -> str:
    calls = [
        _tagged(
            rules,
            tool,
            f'<invoke name="{tool.name}">\n',
            lambda name: f'<parameter name="{name}">',
            "</parameter>\n",
            "</invoke>\n",
        )
        for tool in tools
    ]
    marks = [rules.text(mark) for mark in ("<minimax:tool_call>", "</minimax:tool_call>")]
    return f"{marks[0]} {json.dumps(chr(10))} {rules.repeated(rules.one_of(calls))} {marks[1]}"


def _glm(rules: _Rules, tools: Sequence[Tool]) -> str:
    calls = [
        _tagged(
            rules, tool, f"{tool.name}\n", lambda name: f"<arg_key>{name}</arg_key>\n<arg_value>", "</arg_value>\n", ""
        )
        for tool in tools
    ]
    call = rules.add(f"{rules.text('<tool_call>')} {rules.one_of(calls)} {rules.text('</tool_call>')}")
    return rules.repeated(call, "\n")


_FORMS: Mapping[str, Callable[[_Rules, Sequence[Tool]], str]] = {
    "harmony": _harmony,
    "deepseek": _deepseek,
    "deepseek-v31": _deepseek_v31,
    "kimi": _kimi,
    "minimax": _minimax,
    "glm": _glm,
    "qwen-coder": _qwen_coder,
    "mistral-names": _mistral_names,
    "mistral": _list("[TOOL_CALLS]", ""),
    "lfm": _pythonic("<|tool_call_start|>", "<|tool_call_end|>"),
    "nemotron": _list("<TOOLCALL>", "</TOOLCALL>"),
    "json-lines": _list("<tool_calls>", "</tool_calls>"),
    "granite": _list("<|tool_call|>", ""),
    "hermes": _hermes,
    "llama4": _pythonic("", ""),
    "llama3": _llama,
}
