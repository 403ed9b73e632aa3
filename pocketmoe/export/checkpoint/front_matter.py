"""A checkpoint's README.md: the text of its model card, and of the metadata above it (YAML) what a bundle states.

Strangers write it, and it decides nothing: what cannot be read within bounds is left out, with a note, and never stops
an export. So the metadata is read as a stream of events: no object is constructed from it, an alias ends the reading
before it is followed, and size, depth and count are bounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from pocketmoe.export.tensors.directory import Directory

NAME = "README.md"
MOST_TEXT = 4 << 20
MOST_METADATA = 1 << 20
_MOST_EVENTS = 50_000  # evaluation results in a card have come to 20,000
_DEEPEST = 32
_FRONT = re.compile(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_PLAIN_NULL = {"", "~", "null", "Null", "NULL"}


@dataclass(frozen=True)
class ModelCard:
    """`data`: the metadata's top level, scalars as text; `note`: what was left out."""

    data: dict[str, Any] = field(default_factory=dict[str, Any])
    text: str = ""
    note: str = ""


class _Refused(Exception):
    pass


def read_card(directory: Directory) -> ModelCard:
    """README.md, or an empty card where there is none. Raises BadInput for a link that leads out of the checkpoint."""
    raw = directory.read(NAME)
    if raw is None:
        return ModelCard()
    text, note = raw[:MOST_TEXT].decode("utf-8", "replace"), ""
    if len(raw) > MOST_TEXT:
        note = f"{NAME} is longer than {MOST_TEXT >> 20} MiB, and its end is left out"
    match = _FRONT.match(text.removeprefix("\ufeff"))
    if match is None:
        return ModelCard({}, text, note)
    text = text.removeprefix("\ufeff")[match.end() :]
    try:
        return ModelCard(_metadata(match[1]), text, note)
    except _Refused as error:
        return ModelCard({}, text, f"the metadata of {NAME} is left out: {error}")


def _metadata(source: str) -> dict[str, Any]:
    """The top level of a YAML mapping: text, lists of texts, None for what is nested deeper. Raises _Refused."""
    import yaml

    if len(source) > MOST_METADATA:
        raise _Refused(f"it is longer than {MOST_METADATA >> 20} MiB")
    data: dict[str, Any] = {}
    stack: list[Any] = []  # of open collections: [is a mapping, its key or None, its values or None where unused]
    try:
        events = cast("Iterator[yaml.Event]", yaml.parse(source, Loader=yaml.SafeLoader))
        for count, event in enumerate(events):
            if count > _MOST_EVENTS or len(stack) > _DEEPEST:
                raise _Refused("it is too large or too deep")
            if isinstance(event, yaml.AliasEvent):
                raise _Refused("it has aliases, which are not followed")
            _take(event, stack, data)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise _Refused(f"it is no YAML ({type(error).__name__})") from error
    return data


def _take(event: Any, stack: list[Any], data: dict[str, Any]) -> None:
    """Follow one event: what `data` gets is keys of the outermost mapping, with a scalar or the scalars of a list."""
    import yaml

    if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
        values: list[Any] | None = [] if isinstance(event, yaml.SequenceStartEvent) and len(stack) == 1 else None
        stack.append([isinstance(event, yaml.MappingStartEvent), None, values])
    elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
        _, _, values = stack.pop()
        if len(stack) == 1:
            _put(stack[0], values, data)
    elif isinstance(event, yaml.ScalarEvent):
        plain_null = event.style is None and event.value in _PLAIN_NULL
        value = None if plain_null else event.value
        if len(stack) == 1:
            _put(stack[0], value, data)
        elif len(stack) == 2 and stack[1][2] is not None:
            stack[1][2].append(value)


def _put(top: list[Any], value: Any, data: dict[str, Any]) -> None:
    """A value of the outermost mapping is in turn a key, and what belongs to it."""
    if not top[0]:
        return
    if top[1] is None:
        top[1] = [value]
    else:
        (key,) = top[1]
        if isinstance(key, str):
            data[key] = value
        top[1] = None
