"""Where `run` takes its prompt from: an argument, a file, or standard input, each of any length; and messages."""

# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false
# (messages are whatever JSON a user gives)

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from pocketmoe.bundle.files import MOST_TEXT_BYTES, read_text
from pocketmoe.errors import BadInput

STDIN = "-"
_REMEDY = "Give the prompt as UTF-8 text: --prompt TEXT, --file FILE, or on standard input."


def read_prompt(argument: str | None, option: str | None, file: Path | None) -> str:
    """The prompt, from the one place that is given; standard input where none is, or where that is `-`.

    The last line end of a file or of standard input is left out, as `"$(cat FILE)"` leaves it out. Raises UsageError
    for two places, or none and nothing on standard input; BadInput for what is not UTF-8.
    """
    given = [place for place in (argument, option, file) if place is not None]
    if len(given) > 1:
        raise click.UsageError("Give the prompt once: as an argument, by --prompt, or by --file.")
    if file is not None and str(file) != STDIN:
        return _without_last_end(read_text(file, _REMEDY))
    if given and str(given[0]) != STDIN:
        return _checked(str(given[0]))
    if not given and sys.stdin.isatty():
        raise click.UsageError("Missing the prompt: --prompt TEXT, --file FILE, or on standard input.")
    text = _without_last_end(_read_stdin())
    if not given and not text:
        raise click.UsageError("Missing the prompt: standard input is empty, and neither --prompt nor --file is given.")
    return text


def read_messages(file: Path) -> list[dict[str, Any]]:
    """A conversation: a JSON list of messages, an object with one (`messages`), or what `chat` has saved.

    Raises BadInput for anything else.
    """
    remedy = 'Give a JSON list such as [{"role": "user", "content": "Hello"}].'
    try:
        found = json.loads(read_text(file, remedy))
        messages = found["messages"] if isinstance(found, dict) else found
        known = [{**message, "role": str(message["role"])} for message in messages]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadInput(f"{file} holds no conversation ({type(error).__name__})", remedy) from error
    if not known:
        raise BadInput(f"{file} holds no messages", remedy)
    return known


def _read_stdin() -> str:
    try:
        data = sys.stdin.buffer.read(MOST_TEXT_BYTES + 1)
    except OSError as error:
        raise BadInput(f"standard input cannot be read ({error.strerror})", _REMEDY) from error
    if len(data) > MOST_TEXT_BYTES:
        raise BadInput(f"standard input has more than {MOST_TEXT_BYTES} bytes", "Shorten the prompt.")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"standard input is not UTF-8 text (byte {error.start})", _REMEDY) from error


def _checked(text: str) -> str:
    """Bytes of the command line that are not UTF-8 come as halves of characters, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"the prompt is not UTF-8 text (character {error.start})", _REMEDY) from error
    return text


def _without_last_end(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text
