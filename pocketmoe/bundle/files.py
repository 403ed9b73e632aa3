"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from pocketmoe.bundle.store import translate_write_errors


def write_whole(path: Path, data: bytes) -> None:
    """Put a file in place in one step; what was there stays until then. Makes its directory. Raises OutputError."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    with translate_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
