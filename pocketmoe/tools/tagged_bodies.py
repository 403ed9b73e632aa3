"""Calls that families write as tags, a parameter each. A section's text to its calls, None where it is malformed.

Parameters are text, to which the tool's schema gives a type.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from pocketmoe.tools.arguments import typed, whole_matches
from pocketmoe.tools.calls import Calls, Tool, ToolCall, Tools

_QWEN_CALL = re.compile(r"\s*<function=([^>\n]+)>(.*?)</function>\s*", re.DOTALL)
_QWEN_VALUE = re.compile(r"\s*<parameter=([^>\n]+)>(.*?)</parameter>\s*", re.DOTALL)
_INVOKE = re.compile(r'\s*<invoke name="([^"\n]+)">(.*?)</invoke>\s*', re.DOTALL)
_INVOKE_VALUE = re.compile(r'\s*<parameter name="([^"\n]+)">(.*?)</parameter>\s*', re.DOTALL)
_GLM_CALL = re.compile(r"\s*([^<\s]+)\s*(.*)", re.DOTALL)
_GLM_VALUE = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)


def qwen(body: str, tools: Tools) -> Calls:
    """<function=NAME> <parameter=KEY>VALUE</parameter> </function>, values between line ends."""
    return _all(body, tools, _QWEN_CALL, _QWEN_VALUE, _without_line_ends)


def invoked(body: str, tools: Tools) -> Calls:
    """<invoke name="NAME"> <parameter name="KEY">VALUE</parameter> </invoke>."""
    return _all(body, tools, _INVOKE, _INVOKE_VALUE, lambda text: text)


def glm(body: str, tools: Tools) -> Calls:
    """NAME <arg_key>KEY</arg_key> <arg_value>VALUE</arg_value>, one call."""
    call = _GLM_CALL.fullmatch(body)
    arguments = _values(call[2], _named(tools, call[1]), _GLM_VALUE, lambda text: text) if call else None
    return [ToolCall.of(call[1], arguments)] if call and arguments is not None else None


def _all(
    body: str, tools: Tools, call: re.Pattern[str], value: re.Pattern[str], trimmed: Callable[[str], str]
) -> Calls:
    found: list[ToolCall] = []
    for match in whole_matches(call, body) or ():
        arguments = _values(match[2], _named(tools, match[1].strip()), value, trimmed)
        if arguments is None:
            return None
        found.append(ToolCall.of(match[1].strip(), arguments))
    return found or None


def _values(
    body: str, tool: Tool | None, value: re.Pattern[str], trimmed: Callable[[str], str]
) -> dict[str, Any] | None:
    found = whole_matches(value, body.strip())
    if found is None:
        return None
    given = [(match[1].strip(), trimmed(match[2])) for match in found]
    return {key: typed(tool, key, text) for key, text in given}


def _named(tools: Tools, name: str) -> Tool | None:
    return next((tool for tool in tools if tool.name == name), None)


def _without_line_ends(text: str) -> str:
    return text.removeprefix("\n").removesuffix("\n")
