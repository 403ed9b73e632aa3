"""Bytes that a client has sent as a typed request, or an error that names the field."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar, cast

import msgspec

from pocketmoe.serve.api.errors import ApiError, refused

MOST_DEPTH = 64  # of JSON within JSON

_Request = TypeVar("_Request", bound=msgspec.Struct)
_UNKNOWN = re.compile(r"Object contains unknown field `([^`]*)`")
_MISSING = re.compile(r"Object missing required field `([^`]*)`")
_WORD = re.compile(r"Invalid (?:enum )?value '([^']*)'")
_PLACE = re.compile(r" - at `(?:key` in `)?\$\.?([^`]*)`$")


def decode(body: bytes, kind: type[_Request], complete: Callable[[Any], None] | None = None) -> _Request:
    """A request of one kind. Raises ApiError for anything else: wrong JSON, UTF-8, types, ranges, unknown fields.

    `complete`: puts in what the API allows to be left out, and the kind does not.
    """
    _refuse_deep(body)
    try:
        if complete is None:
            return msgspec.json.decode(body, type=kind)
        whole = msgspec.json.decode(body)
        complete(whole)
        return msgspec.convert(whole, kind)
    except msgspec.ValidationError as error:
        raise _named(str(error)) from error
    except UnicodeDecodeError as error:
        raise ApiError(400, "the body is not UTF-8", code="invalid_json") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON ({error})", code="invalid_json") from error


def _named(text: str) -> ApiError:
    found = _PLACE.search(text)
    place = found[1] if found else ""
    message = text[: found.start()] if found else text
    if unknown := _UNKNOWN.search(message):
        param = f"{place}.{unknown[1]}" if place else unknown[1]
        return ApiError(400, f"'{param}' is not supported by this server", param, "unsupported_parameter")
    if missing := _MISSING.search(message):
        param = f"{place}.{missing[1]}" if place else missing[1]
        return ApiError(400, f"'{param}' is missing", param, "missing_required_parameter")
    if (word := _WORD.search(message)) and place.rpartition(".")[2] == "type":
        return ApiError(400, f"'{word[1]}' is not supported by this server", place, "unsupported_parameter")
    if place and message.startswith("Expected `null`"):  # a field that is known, and in which there may be nothing
        return ApiError(400, f"'{place}' is not supported by this server", place, "unsupported_parameter")
    return refused(place or "body", message, "invalid_type")


def _refuse_deep(body: bytes) -> None:
    """Raise ApiError for brackets nested deeper than any request has them; those within strings do not count."""
    if body.count(b"[") + body.count(b"{") <= MOST_DEPTH:
        return
    depth = 0
    for token in re.finditer(rb'"(?:[^"\\]|\\.)*+"?|[\[{]|[\]}]', body, re.DOTALL):
        first = body[token.start()]
        if first in b"[{":
            depth += 1
            if depth > MOST_DEPTH:
                raise ApiError(400, f"the JSON is nested deeper than {MOST_DEPTH} levels", code="invalid_json")
        elif first in b"]}":
            depth -= 1


def plain(value: object) -> Any:
    """A Struct, and all within it, as dicts and lists; fields that are None or not given are left out."""
    if isinstance(value, msgspec.Struct):
        fields = ((name, getattr(value, name)) for name in value.__struct_fields__)
        return {name: plain(item) for name, item in fields if item is not None and item is not msgspec.UNSET}
    if isinstance(value, list | tuple):
        return [plain(item) for item in cast("list[object]", value)]
    return value
