"""What the commands share on the terminal: a progress bar on stderr."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Self

import click

_BAR_AFTER_S = 0.4  # work that is over sooner needs no bar


def bar(what: str, done: int, total: int, left_s: float, columns: int) -> str:
    """A bar on one line of the terminal, shorter than `columns`: one that wraps cannot be drawn over.

    First the bar itself becomes shorter, then what is being done.
    """
    behind = f" {done}/{total} {left_s:.0f} s left"
    room = columns - 1 - len(behind)
    cells = min(24, room - len(what) - 3)
    if cells < 4:
        return f"{what[: max(0, room)]}{behind}"[: columns - 1]
    filled = cells * done // total
    return f"{what} [{'#' * filled}{'.' * (cells - filled)}]{behind}"


class ProgressBar:
    """A progress callback, as a context manager. On a terminal a bar; elsewhere one line for each kind of work."""

    def __init__(self) -> None:
        self._on_terminal = sys.stderr.isatty()
        self._what = ""
        self._began = 0.0
        self._drawn = False

    def __call__(self, what: str, done: int, total: int) -> None:
        """`what` is being done; `done` of `total` parts are finished. Without a total `what` is a remark, said once."""
        if not total:
            self.clear()
            click.echo(f"{what[0].upper()}{what[1:]}.", err=True)
            return
        now = time.monotonic()
        if what != self._what:
            self.clear()
            self._what, self._began = what, now
            self._said = False
        if now - self._began < _BAR_AFTER_S:
            return
        if self._on_terminal:
            left = (now - self._began) * (total - done) / done if done else 0
            line = bar(what, done, total, left, shutil.get_terminal_size().columns)
            click.echo(f"\r\033[K{line}", err=True, nl=False)
            self._drawn = True
        elif not self._said:
            click.echo(f"{what} ...", err=True)
            self._said = True

    def clear(self) -> None:
        """Take the bar away."""
        if self._drawn:
            click.echo("\r\033[K", err=True, nl=False)
            self._drawn = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
