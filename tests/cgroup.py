"""Memory limits in tests: skip, with the reason, where this system makes none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from pocketmoe.profiles.machine import limit
from pocketmoe.profiles.machine.limit import Limited


def run_limited(
    command: Sequence[str],
    limit_bytes: int | None,
    timeout_s: float | None = 120,
    on_line: Callable[[str], None] | None = None,
) -> Limited:
    try:
        return limit.run_limited(command, limit_bytes, timeout_s, on_line)
    except limit.LimitUnavailable as reason:
        pytest.skip(str(reason))
