"""The cost model against sums done by hand."""

# pyright: reportArgumentType=false

from __future__ import annotations

import pytest

from pocketmoe.profiles.compare.cost import (
    Assumptions,
    Work,
    api_usd_per_mtok,
    break_even,
    device_cost,
    kwh_per_mtok,
    rented_usd_per_mtok,
    requests_per_s,
)

GIVEN = Assumptions(
    device_price_usd=730.5,
    resale_usd=0,
    years=2,  # 730.5 days: one dollar a day
    utilisation=0.5,
    usd_per_kwh=0.2,
    load_watts=50,
    idle_watts=10,
)


def test_electricity_of_the_brief() -> None:
    """45 W at 10 tokens/s and 0.15 USD/kWh, with nothing else to pay, are 0.19 USD per million; idling adds the rest.

    1e6 / 10 s = 27.78 h, x 0.045 kW = 1.25 kWh.
    """
    assert kwh_per_mtok(45, 10) == pytest.approx(1.25)
    free = Assumptions(device_price_usd=0, usd_per_kwh=0.15, load_watts=45, idle_watts=0, utilisation=1)
    cost = device_cost(10, free)
    assert cost.usd_per_mtok(cost.most_tokens_per_day) == pytest.approx(1.25 * 0.15)


def test_a_device_costs_its_price_over_its_life_and_its_electricity() -> None:
    """By hand: 1 USD a day, 10 W all day at 0.2 USD/kWh, 40 W more while it makes 10 tokens/s half of the day.

    864,000 tokens a day at most, 432,000 made: (1 + 0.048) USD + 12 h x 0.04 kW x 0.2 = 1.144 USD for 0.432 million.
    """
    cost = device_cost(10, GIVEN)
    assert cost.fixed_usd_per_day == pytest.approx(1 + 24 * 0.010 * 0.2)
    assert cost.most_tokens_per_day == pytest.approx(864_000)
    assert cost.usd_per_mtok(0.5 * 864_000) == pytest.approx(1.144 / 0.432)
    # the same by the formula of the literature
    hours = 2 * 365.25 * 24
    formula = 1e6 / 36_000 * (730.5 / (hours * 0.5) + 0.050 * 0.2 + 0.010 * 0.2 * (1 - 0.5) / 0.5)
    assert cost.usd_per_mtok(0.5 * 864_000) == pytest.approx(formula)


def test_rent_and_apis() -> None:
    """3.60 USD per hour at 1,000 tokens/s is 1 USD per million, 2 when half of the hours are idle; prompts count."""
    assert rented_usd_per_mtok(3.6, 1000, 1.0) == pytest.approx(1)
    assert rented_usd_per_mtok(3.6, 1000, 0.5) == pytest.approx(2)
    assert api_usd_per_mtok(0.1, 0.3, Work(prompt_tokens=2000, output_tokens=500)) == pytest.approx(0.3 + 4 * 0.1)
    assert requests_per_s(Work(10, 11), ttft_s=1.0, tokens_per_s=10) == pytest.approx(0.5)


def test_break_even_is_where_both_cost_the_same() -> None:
    """At that many tokens a day the device's price equals the cloud's; above, it is lower."""
    cost = device_cost(10, GIVEN)
    even = break_even(cost, cloud_usd_per_mtok=2.0).tokens_per_day
    assert even is not None
    assert cost.usd_per_mtok(even) == pytest.approx(2.0)
    assert cost.usd_per_mtok(even * 1.1) < 2.0


def test_never_says_why() -> None:
    """Never, when electricity alone costs more, exactly as much, or the device cannot make that many."""
    cost = device_cost(10, GIVEN)
    electricity = 1e6 * cost.marginal_usd_per_token
    assert electricity == pytest.approx(1e6 / 36_000 * 0.040 * 0.2)
    for price in (0.0, 0.9 * electricity, electricity):
        even = break_even(cost, price)
        assert even.tokens_per_day is None
        assert "electricity" in even.why_never
    too_much = break_even(cost, electricity + 0.5)  # 1.048 USD / 0.5 per million: 2.1 million a day
    assert too_much.tokens_per_day is None
    assert "2,096,000" in too_much.why_never


@pytest.mark.parametrize("field", ["utilisation", "cloud_utilisation", "years"])
def test_nothing_is_divided_by_zero(field: str) -> None:
    with pytest.raises(ValueError, match="above 0"):
        Assumptions(**{field: 0.0})
