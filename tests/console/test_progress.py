"""The bar on a terminal of any width."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketmoe.console import progress
from pocketmoe.console.progress import ProgressBar, bar
from tests.hang import HANG_S

TOTAL = st.integers(1, 10**6)


@given(what=st.text("abc ", min_size=1, max_size=60), total=TOTAL, data=st.data(), columns=st.integers(1, 200))
def test_it_never_wraps_and_loses_its_figures_last(what: str, total: int, data: st.DataObject, columns: int) -> None:
    """A line as wide as the terminal would wrap, and the next one would not be drawn over it."""
    done = data.draw(st.integers(0, total))
    line = bar(what, done, total, 7.4, columns)
    figures = f" {done}/{total} 7 s left"
    assert len(line) < columns or line == ""
    if columns > len(figures):
        assert line.endswith(figures)
    if columns > len(what) + len(figures) + 8:
        cells = line[len(what) + 2 : -len(figures) - 1]
        assert line.startswith(f"{what} [")
        assert set(cells) <= {"#", "."}
        assert cells.count("#") == len(cells) * done // total


class Written:
    """Takes what is written to stderr, and tells when a text is there."""

    def __init__(self, is_one: bool) -> None:
        self._is_one = is_one
        self.text = ""
        self._changed = threading.Condition()

    def isatty(self) -> bool:
        return self._is_one

    def write(self, text: str) -> int:
        with self._changed:
            self.text += text
            self._changed.notify_all()
        return len(text)

    def flush(self) -> None:
        pass

    def wait_for(self, text: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: text in self.text, HANG_S), self.text


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is waited for."""
    for name in ("BAR_AFTER_S", "LINE_AFTER_S", "PHASE_S"):
        monkeypatch.setattr(progress, name, 0.0)
    monkeypatch.setattr(progress, "TICK_S", 0.001)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_reports_nothing_is_shown_meanwhile(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    """A terminal gets a clock that is drawn anew, a file one line; either the time of each phase in the end."""
    terminal = Written(is_terminal)
    monkeypatch.setattr("sys.stderr", terminal)
    with ProgressBar(phases=True) as report:
        report("capturing", 0, 1)
        terminal.wait_for("capturing 0 s" if is_terminal else "capturing ...\n")
        report("writing", 0, 1)
        terminal.wait_for("capturing: 0 s\n")
    assert terminal.text.endswith("writing: 0 s\n")
    assert ("\r" in terminal.text) == is_terminal


@pytest.mark.usefixtures("soon")
def test_a_failure_takes_the_bar_away_and_claims_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Written(True)
    monkeypatch.setattr("sys.stderr", terminal)

    def work() -> None:
        with ProgressBar(phases=True) as report:
            report("capturing", 0, 1)
            terminal.wait_for("capturing")
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        work()
    assert "capturing:" not in terminal.text
    assert terminal.text.endswith("\033[K")
