"""Messages as clients write them, as chat templates take them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pocketmoe.errors import BadInput
from pocketmoe.jsonfile import is_array, is_object
from pocketmoe.tools.families import Dialect


def for_template(messages: Sequence[Mapping[str, Any]], spoken: Dialect) -> list[Mapping[str, Any]]:
    """The same, with the arguments of past calls in the form that the template takes: an object, or its text.

    Raises BadInput for calls that are none.
    """
    as_text = spoken.family is not None and spoken.family.arguments_as_text
    return [_with_calls(message, as_text) if _has_calls(message) else message for message in messages]


def _has_calls(message: object) -> bool:
    return is_object(message) and bool(message.get("tool_calls"))


def _with_calls(message: Mapping[str, Any], as_text: bool) -> Mapping[str, Any]:
    calls: Any = message["tool_calls"]
    if not is_array(calls):
        raise BadInput("a message's tool_calls are no list", "Give them as OpenAI has them.")
    return {**message, "tool_calls": [_call(call, as_text) for call in calls]}


def _plain_json(text: str) -> Any:
    """A value that JSON has, with texts that UTF-8 has. Raises ValueError for NaN, Infinity and halves of pairs."""
    value = json.loads(text)
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return value


def _call(call: Any, as_text: bool) -> dict[str, Any]:
    function = call.get("function") if is_object(call) else None
    if not is_object(call) or not is_object(function) or not isinstance(function.get("name"), str):
        raise BadInput("a message's tool call is no function with a name", "Give it as OpenAI has it.")
    arguments: Any = function.get("arguments")
    if isinstance(arguments, str) and not as_text:
        with contextlib.suppress(ValueError, RecursionError):  # else a text that the model is to see as it wrote it
            arguments = _plain_json(arguments or "{}")
    elif as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments or {}, ensure_ascii=False)
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}
