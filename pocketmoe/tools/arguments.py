"""The arguments of a call, checked: JSON, Python's literals, or text that a schema gives a type.

Each function returns None for what is none of it, so that a malformed call stays the text that it is.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from pocketmoe.jsonfile import is_array, is_object
from pocketmoe.tools.calls import Tool

_MOST_NESTED = 64
_NAMES = {"true": True, "false": False, "null": None}


def read_json(text: str) -> Any:
    """A JSON value, None for what is none: not a number, nested too deep, followed by anything."""
    try:
        found = json.loads(text, parse_constant=_refuse)
        json.dumps(found, ensure_ascii=False).encode()  # halves of characters cannot be sent on
    except (ValueError, RecursionError):
        return None
    return found if _depth_is_fine(found) else None


def read_object(value: Any) -> dict[str, Any] | None:
    """The arguments of a call: an object, or its text, which some models write; nothing at all is an empty one."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    found = read_json(value) if isinstance(value, str) else value
    return found if is_object(found) else None


def typed(tool: Tool | None, name: str, text: str) -> Any:
    """A parameter's value of its text: the text where the tool's schema says string, or says nothing and it is no JSON.

    A text that the schema's type does not fit stays text.
    """
    schema: Any = tool.properties.get(name) if tool else None
    types = _types(schema)
    if types == {"string"}:
        return text
    found = read_json(text)
    if found is None and text.strip() != "null":
        return _NAMES.get(text.strip().lower(), text) if types & {"boolean"} else text
    if "string" in types and not _is_of(found, types - {"string"}):
        return text
    return found


def read_literal(node: ast.expr) -> Any:
    """The value of a literal in Python or JSON. Raises ValueError for anything else."""
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [read_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [read_literal(key) if key is not None else None for key in node.keys]
        if not all(isinstance(key, str) for key in keys):
            raise ValueError("a key is no text")
        return dict(zip(keys, map(read_literal, node.values), strict=True))
    found = ast.literal_eval(node)
    if isinstance(found, complex | bytes | set) or found is ...:
        raise ValueError("JSON has no such value")
    return found


def whole_matches(pattern: re.Pattern[str], text: str) -> list[re.Match[str]] | None:
    """The matches, one after the other, that a text consists of; None where there is anything else in it."""
    found: list[re.Match[str]] = []
    at = 0
    while at < len(text):
        match = pattern.match(text, at)
        if not match:
            return None
        found.append(match)
        at = match.end()
    return found


def _types(schema: Any) -> set[str]:
    if not is_object(schema):
        return set()
    found = schema.get("type")
    if is_array(found):
        return {str(one) for one in found}
    if isinstance(found, str):
        return {found}
    if is_array(schema.get("enum")) and all(isinstance(one, str) for one in schema["enum"]):
        return {"string"}
    choices = [schema.get(name) for name in ("anyOf", "oneOf")]
    return {one for choice in choices if is_array(choice) for part in choice for one in _types(part)}


def _is_of(value: Any, types: set[str]) -> bool:
    kinds: Mapping[str, Any] = {
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "object": dict,
        "array": list,
        "null": type(None),
    }
    if isinstance(value, bool):
        return "boolean" in types
    return any(isinstance(value, kinds[one]) for one in types if one in kinds)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _depth_is_fine(value: Any) -> bool:
    level = [value]
    for _ in range(_MOST_NESTED):
        if not level:
            return True
        inner = [list(part.values()) if is_object(part) else part if is_array(part) else [] for part in level]
        level = [item for items in inner for item in items]
    return False
