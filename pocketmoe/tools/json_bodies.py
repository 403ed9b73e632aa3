"""Calls that families write as JSON. Each function: a section's text to its calls, None where it is malformed."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from pocketmoe.jsonfile import is_array, is_object
from pocketmoe.tools.arguments import read_json, read_literal, read_object, whole_matches
from pocketmoe.tools.calls import Calls, ToolCall, Tools

_ARGUMENTS = ("arguments", "parameters")
_MISTRAL = re.compile(r"\s*([^\s\[\]{}]+)\s*(?:\[CALL_ID\]\s*([^\s\[\]{}]+)\s*)?(?:\[ARGS\])?\s*(?=\{)")
_DEEPSEEK = re.compile(r"\s*<｜tool▁call▁begin｜>(.*?)<｜tool▁sep｜>(.*?)<｜tool▁call▁end｜>\s*", re.DOTALL)
_FENCED = re.compile(r"([^\n]*)\n```(?:json)?\n(.*?)\n?```\s*", re.DOTALL)
_KIMI = re.compile(r"\s*<\|tool_call_begin\|>(.*?)<\|tool_call_argument_begin\|>(.*?)<\|tool_call_end\|>\s*", re.DOTALL)


def one_or_more(body: str, tools: Tools) -> Calls:  # noqa: ARG001
    """An object with name and arguments, a list of such, or several one after the other."""
    found: list[ToolCall] = []
    for value in _values(body) or []:
        for item in value if is_array(value) else [value]:
            call = _call(item)
            if call is None:
                return None
            found.append(call)
    return found or None


def mistral(body: str, tools: Tools) -> Calls:
    """A list of calls; or, since 2025, name[ARGS]{...}, the next one after another [TOOL_CALLS]."""
    if body.lstrip().startswith(("[", "{")):
        return one_or_more(body, tools)
    found: list[ToolCall] = []
    while True:
        head = _MISTRAL.match(body)
        if not head:
            return None
        try:
            value, end = json.JSONDecoder().raw_decode(body, head.end())
        except (ValueError, RecursionError):
            return None
        arguments = read_json(body[head.end() : end])
        if not is_object(arguments) or not is_object(value):
            return None
        found.append(ToolCall.of(head[1], arguments, head[2]))
        body = body[end:].strip()
        if not body:
            return found
        if not body.startswith("[TOOL_CALLS]"):
            return None
        body = body.removeprefix("[TOOL_CALLS]")


def deepseek(body: str, tools: Tools) -> Calls:  # noqa: ARG001
    """function<sep>NAME and fenced JSON (V3, R1), or NAME<sep>JSON (V3.1)."""
    found: list[ToolCall] = []
    for match in whole_matches(_DEEPSEEK, body) or ():
        name, text = match[1].strip(), match[2]
        fenced = _FENCED.fullmatch(text)
        if fenced:
            name, text = fenced[1].strip(), fenced[2]
        arguments = read_json(text)
        if not name or not is_object(arguments):
            return None
        found.append(ToolCall.of(name, arguments))
    return found or None


def kimi(body: str, tools: Tools) -> Calls:  # noqa: ARG001
    """functions.NAME:NUMBER, which is the call's id too, and JSON."""
    found: list[ToolCall] = []
    for match in whole_matches(_KIMI, body) or ():
        id_ = match[1].strip()
        name = id_.removeprefix("functions.").rpartition(":")[0] or id_.removeprefix("functions.")
        arguments = read_json(match[2])
        if not name or not is_object(arguments):
            return None
        found.append(ToolCall.of(name, arguments, id_))
    return found or None


def llama(body: str, tools: Tools) -> Calls:
    """An object with name and parameters, several with semicolons between them; only of tools that there are."""
    found = one_or_more(body.strip().removesuffix(";"), tools)
    return _only_of(found, tools)


def pythonic(body: str, tools: Tools) -> Calls:
    """A list of calls in Python's words: [f(a=1), g(b="x")]; only of tools that there are."""
    try:
        parsed = ast.parse(body.strip(), mode="eval").body
        if not isinstance(parsed, ast.List) or not parsed.elts:
            return None
        found = [_python_call(call) for call in parsed.elts]
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    return _only_of(found, tools)


def _python_call(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("is no call by names")
    arguments = {keyword.arg: read_literal(keyword.value) for keyword in node.keywords}
    if None in arguments or read_json(json.dumps(arguments)) is None:
        raise ValueError("is no call by names")
    return ToolCall(ast.unparse(node.func), json.dumps(arguments, ensure_ascii=False))


def _only_of(calls: Calls, tools: Tools) -> Calls:
    names = {tool.name for tool in tools}
    return calls if calls and all(call.name in names for call in calls) else None


def _call(value: Any) -> ToolCall | None:
    if not is_object(value):
        return None
    if is_object(value.get("function")):  # as clients have it
        value = {**value["function"], "id": value.get("id")}
    name, given = value.get("name"), [value[key] for key in _ARGUMENTS if key in value]
    arguments = read_object(given[0] if given else None)
    id_ = value.get("id")
    if not isinstance(name, str) or not name or arguments is None:
        return None
    return ToolCall.of(name, arguments, id_ if isinstance(id_, str) else None)


def _values(text: str) -> list[Any] | None:
    """JSON values one after the other, with white space, commas or semicolons between them."""
    found: list[Any] = []
    at, decoder = 0, json.JSONDecoder()
    while True:
        while at < len(text) and text[at] in " \n\r\t,;":
            at += 1
        if at == len(text):
            return found
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        value = read_json(text[at:end])
        if value is None:
            return None
        found.append(value)
        at = end
