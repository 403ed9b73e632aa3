"""The prompts of a file: one in each line, as text or, in a file called *.jsonl, as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pocketmoe.bundle.files import read_text
from pocketmoe.errors import BadInput

MOST_BYTES = 64 << 20  # read at once, before memory is planned
_REMEDY = (
    'Give a prompt in each line: as text or, in a file called *.jsonl, as {"prompt": "..."} or {"messages": [...]}.'
)
_Message = dict[str, Any]


@dataclass(frozen=True)
class BatchPrompt:
    """One of the prompts: a text, or messages with role and content."""

    id: str | int  # as the file has it, else the number of its line, from 1
    prompt: str | tuple[_Message, ...]


class _Line(msgspec.Struct):
    """What a line of JSON may hold; what else it holds is not looked at."""

    id: str | int | None = None
    prompt: str | None = None
    messages: tuple[_Message, ...] | None = None


def read_prompts(path: Path) -> list[BatchPrompt]:
    """All prompts of a file, in its order; empty lines are none.

    Raises BadInput, which names the line, for what is no prompt, and for an id that comes twice.
    """
    text = read_text(path, _REMEDY, MOST_BYTES)
    is_json = path.suffix.lower() == ".jsonl"
    found: list[BatchPrompt] = []
    lines: dict[str | int, int] = {}  # by id
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        prompt = _of_json(line, number, path) if is_json else BatchPrompt(number, line)
        before = lines.setdefault(prompt.id, number)
        if before != number:
            remedy = "Give each line an id of its own, or none of them one."
            raise BadInput(f"{path}, lines {before} and {number}: both have the id {prompt.id!r}", remedy)
        found.append(prompt)
    if not found:
        raise BadInput(f"{path} holds no prompts", _REMEDY)
    return found


def _of_json(line: str, number: int, path: Path) -> BatchPrompt:
    try:
        found = msgspec.json.decode(line, type=_Line)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise BadInput(f"{path}, line {number}: {error}", _REMEDY) from error
    given = [part for part in (found.prompt, found.messages) if part]
    if len(given) != 1:
        what = "has a prompt and messages" if given else "has neither a prompt nor messages"
        raise BadInput(f"{path}, line {number}: {what}", _REMEDY)
    if found.messages and not all(isinstance(message.get("role"), str) for message in found.messages):
        raise BadInput(f"{path}, line {number}: has a message without a role", _REMEDY)
    return BatchPrompt(number if found.id is None else found.id, given[0])
