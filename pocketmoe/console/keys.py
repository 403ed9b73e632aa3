"""The keys of a server: from a file or the environment, never from a command line, which all users of a machine see."""

from __future__ import annotations

import os
from pathlib import Path

from pocketmoe.bundle.files import read_text
from pocketmoe.errors import BadInput

VARIABLE = "POCKETMOE_API_KEY"
_LEAST = 16  # characters
_REMEDY = "Make one, for example by `openssl rand -hex 32`."


def read_keys(file: Path | None) -> tuple[str, ...]:
    """The keys of a file, one a line, and that of the environment. Raises BadInput for what is no key, or too short."""
    lines = read_text(file, "Give a file with a key a line.", 1 << 16).splitlines() if file else []
    keys = tuple(line.strip() for line in (*lines, os.environ.get(VARIABLE, "")) if line.strip())
    where = str(file) if file else VARIABLE
    if file and not keys:
        raise BadInput(f"{file} has no key", _REMEDY)
    for key in keys:
        if len(key) < _LEAST or not key.isascii() or not key.isprintable():
            raise BadInput(f"{where}: a key has at least {_LEAST} letters, digits or signs, all of ASCII", _REMEDY)
    return keys
