"""The bar on a terminal of any width."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pocketmoe.console.progress import bar

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
