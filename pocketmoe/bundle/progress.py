"""How the library says what it is doing, without printing."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # what is being done, done, total; a total of 0: a remark, said once


def no_progress(_what: str, _done: int, _total: int) -> None:
    """The default progress callback: says nothing."""


OnStep = Callable[[str], None]  # told the name of each step of writing a bundle once it is done: where tests kill it


def no_step(_name: str) -> None:
    """The default: nobody needs to know."""
