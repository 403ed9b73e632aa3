"""The decode-step model beside what was measured of this runtime, and published of llama.cpp."""

from __future__ import annotations

import pytest

from tests.profiles.estimate.speeds import Row, measured, published


@pytest.mark.parametrize("row", measured(), ids=lambda row: row.what)
def test_what_was_measured_is_predicted_within_fifteen_percent(row: Row) -> None:
    """But for the row in which the disk changed; and that one within the range that is printed for the disk, 1.4."""
    assert abs(row.error) < (0.4 if row.disk_changed else 0.15)


@pytest.mark.parametrize("row", published(), ids=lambda row: row.what)
def test_what_was_published_lies_within_the_printed_range(row: Row) -> None:
    """Another engine on a machine that nobody measured for us: the range has to hold it, the middle within 40%."""
    assert row.low <= row.known <= row.high
    assert abs(row.error) < 0.4


def test_enough_was_published() -> None:
    """Eight figures at least, on each kind of processor that plan says is untested."""
    rows = published()
    assert len(rows) >= 8
    assert len({row.where for row in rows}) >= 6
