"""What an elastic budget becomes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pocketmoe.runtime.memory.pressure import Pressure, next_budget, read_pressure

GB = 10**9
SIZES = st.integers(1, 64 * GB)


@given(now=SIZES, full=SIZES, least=SIZES, stalled=st.floats(0, 1), available=SIZES)
def test_it_stays_within_its_ends_and_goes_the_right_way(
    now: int, full: int, least: int, stalled: float, available: int
) -> None:
    """Between the least and the full budget; under pressure never more than before, in calm never less."""
    now, least = min(now, full), min(least, full)
    now = max(now, least)
    pressure = Pressure(stalled, available, 64 * GB)
    found = next_budget(now, full, least, pressure)
    assert least <= found <= full
    if pressure.is_short:
        assert found <= now
    elif pressure.is_calm:
        assert found >= now
    else:
        assert found == now


def test_it_gives_way_and_comes_back() -> None:
    """Under lasting pressure it ends at the least, and afterwards at the full one."""
    budget = 8 * GB
    for _ in range(30):
        budget = next_budget(budget, 8 * GB, GB, Pressure(0.5, GB, 16 * GB))
    assert budget == GB
    for _ in range(30):
        budget = next_budget(budget, 8 * GB, GB, Pressure(0.0, 8 * GB, 16 * GB))
    assert budget == 8 * GB


def test_the_system_is_read() -> None:
    """Whatever it tells of itself, it is a share and bytes."""
    found = read_pressure()
    assert 0 <= found.stalled <= 1
    assert 0 <= found.available_bytes <= found.machine_bytes
