"""The keywords of JSON schemas that are held; the others are refused by name.

llguidance refuses keywords that it knows and does not hold, and says nothing of those that it does not know, nor of
older drafts' meanings. A schema that holds less than its author thinks is worse than none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pocketmoe.errors import BadInput
from pocketmoe.jsonfile import is_array, is_object

MOST_BYTES = 1 << 20  # of a schema
_REMEDY = "docs/STRUCTURED.md lists what is held."

_MAPS = {"properties", "patternProperties", "$defs", "definitions"}  # of schemas, by name
_LISTS = {"prefixItems", "anyOf", "oneOf", "allOf"}
_SCHEMAS = {"items", "additionalProperties"}
_HELD = {
    *_MAPS, *_LISTS, *_SCHEMAS,
    "$ref", "const", "enum", "type", "minItems", "maxItems", "required", "minProperties", "maxProperties", "minLength",
    "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
}  # fmt: skip
# What says something about a schema, and nothing about what it allows (JSON Schema 2020-12, 9 and Validation 8 to 9).
_SAYS_NOTHING = {
    "$schema", "$id", "id", "$anchor", "$comment", "$vocabulary", "title", "description", "default", "examples",
    "example", "deprecated", "readOnly", "writeOnly", "contentEncoding", "contentMediaType", "contentSchema",
    "discriminator",
}  # fmt: skip


def read_schema(schema: object) -> dict[str, Any]:
    """A schema of JSON text, a mapping, or a class that gives its own (`model_json_schema`, as pydantic's do).

    Raises BadInput for what is no schema, and for the first keyword in it that would not be held.
    """
    if hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()  # type: ignore[attr-defined]
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        if len(text) > MOST_BYTES:
            raise BadInput(f"the JSON schema has more than {MOST_BYTES >> 20} MiB", "Give a smaller one.")
        found: Any = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise BadInput(f"the JSON schema cannot be read ({error})", "Give a JSON object.") from error
    if found is True:
        found = {}
    if found is False:
        raise BadInput("the JSON schema `false` allows nothing", "Give one that an answer can keep.")
    if not is_object(found):
        raise BadInput(f"the JSON schema is no object but {text[:40]}", "Give a JSON object.")
    _refuse_unheld(found)
    return found


def _refuse_unheld(schema: Mapping[str, Any]) -> None:
    for part in _parts(schema):
        for keyword, value in part.items():
            if keyword.startswith("x-") or keyword in _SAYS_NOTHING:
                continue
            if keyword not in _HELD:
                raise BadInput(f"the JSON schema's keyword {keyword!r} cannot be held", _REMEDY)
            _refuse_older_meaning(keyword, value)


def _refuse_older_meaning(keyword: str, value: object) -> None:
    if keyword == "items" and is_array(value):
        raise BadInput("the JSON schema's `items` is a list", "Newer drafts call that `prefixItems`.")
    if keyword.startswith("exclusive") and isinstance(value, bool):
        raise BadInput(f"the JSON schema's {keyword} is true or false", "Newer drafts give the number itself.")


def _parts(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A schema and all schemas in it."""
    waiting: list[Any] = [schema]
    while waiting:
        part = waiting.pop()
        if not is_object(part):
            continue
        yield part
        for keyword, value in part.items():
            if keyword in _MAPS and is_object(value):
                waiting += value.values()
            elif keyword in _LISTS and is_array(value):
                waiting += value
            elif keyword in _SCHEMAS:
                waiting.append(value)
