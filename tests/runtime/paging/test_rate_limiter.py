"""A slowed-down disk serves its readers one after the other."""

from __future__ import annotations

from pocketmoe.runtime.paging.rate_limiter import RateLimiter


def test_reads_end_when_the_slower_disk_would_have_ended_them() -> None:
    """Two reads at once queue up; one after a pause does not; what was slow already is not slowed down."""
    now, slept = [10.0], []
    pace = RateLimiter(100.0, clock=lambda: now[0], sleep=slept.append)
    pace.wait(50, began=10.0)  # until 10.5
    pace.wait(50, began=10.0)  # until 11.0
    now[0] = 20.0
    pace.wait(100, began=19.5)  # until 20.5
    now[0] = 40.0
    pace.wait(100, began=30.0)  # until 31: past
    assert slept == [0.5, 1.0, 0.5]
