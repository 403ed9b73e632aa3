"""A JSON line for each request, and for what happens to the server: never a text, unless that was asked for."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import traceback
from collections.abc import Callable
from typing import Any

_AGAIN_S = 10.0  # before a library may say the same thing once more


class Log:
    """Writes lines through a function, which may be called from any thread."""

    def __init__(self, write: Callable[[str], None], *, text: bool = False) -> None:
        """`text`: also what was asked and answered."""
        self._write = write
        self.text = text

    def event(self, what: str, **fields: Any) -> None:
        """One line; fields that are None are left out."""
        known = {name: _short(value) for name, value in fields.items() if value is not None}
        self._write(json.dumps({"time": round(time.time(), 3), "event": what, **known}, default=str))

    def failure(self, what: str, error: BaseException, **fields: Any) -> None:
        """Something that should not have happened, with where it did."""
        self.event(what, error="".join(traceback.format_exception(error)), **fields)


def _short(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


class Forwarded(logging.Handler):
    """What a library logs, as lines of ours."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.ERROR)
        self._log = log
        self._last, self._until = "", 0.0  # what was said last is not said again before then

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, asyncio.CancelledError):  # the server ends, and leaves it no time
            return
        said = f"{record.name} {record.getMessage()}"
        if said == self._last and time.monotonic() < self._until:
            return
        self._last, self._until = said, time.monotonic() + _AGAIN_S
        self._log.event(
            "library", library=record.name, message=record.getMessage(),
            error="".join(traceback.format_exception(error)) if error else None,
        )  # fmt: skip
