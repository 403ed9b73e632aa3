"""What the commands share on the terminal: a progress bar on stderr."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from typing import Self

import click

BAR_AFTER_S = 0.4  # work that is over sooner needs no bar
LINE_AFTER_S = 5.0  # without a terminal, where nothing is reported meanwhile
PHASE_S = 1.0
TICK_S = 0.5


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
    """A progress callback, as a context manager. On a terminal a bar; elsewhere one line for each kind of work.

    On a terminal it is drawn anew twice a second, also while nothing is reported. With `phases` each kind of work that
    took a second or more leaves a line with its time.
    """

    def __init__(self, phases: bool = False) -> None:
        self._on_terminal = sys.stderr.isatty()
        self._phases = phases
        self._what = ""
        self._done = self._total = 0
        self._began = 0.0
        self._drawn = self._said = False
        self._lock = threading.RLock()
        self._over = threading.Event()

    def __call__(self, what: str, done: int, total: int) -> None:
        """`what` is being done; `done` of `total` parts are finished. Without a total `what` is a remark, said once."""
        with self._lock:
            if not total:
                self.clear()
                click.echo(f"{what[0].upper()}{what[1:]}.", err=True)
                return
            if what != self._what:
                self._end_phase()
                self._what, self._began, self._said = what, time.monotonic(), False
            self._done, self._total = done, total
            self._show(BAR_AFTER_S)

    def _show(self, after_s: float) -> None:
        elapsed_s = time.monotonic() - self._began
        if not self._what or elapsed_s < after_s:
            return
        if self._on_terminal:
            columns = shutil.get_terminal_size().columns
            if self._done or self._total > 1:
                left_s = elapsed_s * (self._total - self._done) / self._done if self._done else 0
                line = bar(self._what, self._done, self._total, left_s, columns)
            else:
                line = f"{self._what} {elapsed_s:.0f} s"[: columns - 1]
            click.echo(f"\r\033[K{line}", err=True, nl=False)
            self._drawn = True
        elif not self._said:
            click.echo(f"{self._what} ...", err=True)
            self._said = True

    def _end_phase(self) -> None:
        """A line with the time of what has been done, where that is wanted and was long."""
        self.clear()
        elapsed_s = time.monotonic() - self._began
        if self._phases and self._what and elapsed_s >= PHASE_S:
            click.echo(f"{self._what}: {elapsed_s:.0f} s", err=True)

    def _tick(self) -> None:
        while not self._over.wait(TICK_S):
            with self._lock:
                if not self._over.is_set():
                    self._show(BAR_AFTER_S if self._on_terminal else LINE_AFTER_S)

    def clear(self) -> None:
        """Take the bar away."""
        with self._lock:
            if self._drawn:
                click.echo("\r\033[K", err=True, nl=False)
                self._drawn = False

    def __enter__(self) -> Self:
        threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._lock:
            self._over.set()
            if kind is None:
                self._end_phase()
            self.clear()
            self._what = ""
