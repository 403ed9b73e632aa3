"""What a million tokens cost: on a device that is owned, on a GPU that is rented, from an API paid by the token.

A million tokens are a million output tokens with the prompts that go with them. Pure arithmetic; every assumption is a
field, and a report prints them all.
"""

from __future__ import annotations

from dataclasses import dataclass

_HOURS_PER_YEAR = 365.25 * 24
_SECONDS_PER_DAY = 86400
_MILLION = 1e6


@dataclass(frozen=True)
class Assumptions:
    """What the money depends on and no measurement says. `utilisation`: share of the hours in which tokens are made."""

    device_price_usd: float = 600.0
    resale_usd: float = 0.0
    years: float = 3.0
    utilisation: float = 0.25
    cloud_utilisation: float = 0.25  # of the hours that a GPU is rented; where it is paid by the second, all of them
    usd_per_kwh: float = 0.15
    load_watts: float = 45.0
    idle_watts: float = 8.0
    users: int = 64  # at most at once on a GPU that is kept busy

    def __post_init__(self) -> None:
        if not (0 < self.utilisation <= 1 and 0 < self.cloud_utilisation <= 1 and self.years > 0):
            raise ValueError("a utilisation is above 0 and at most 1, and years are above 0")


@dataclass(frozen=True)
class Work:
    """One request, over and over: so many tokens in and out."""

    prompt_tokens: int
    output_tokens: int


def requests_per_s(work: Work, ttft_s: float, tokens_per_s: float) -> float:
    """One user at a time: the first token comes after `ttft_s`, the others at `tokens_per_s`."""
    return 1 / (ttft_s + (work.output_tokens - 1) / tokens_per_s)


@dataclass(frozen=True)
class DeviceCost:
    """An owned device that makes `tokens_per_s` when it works: what a day costs, and each token on top of it."""

    fixed_usd_per_day: float  # its price over its life, and idling all day
    marginal_usd_per_token: float  # electricity above idling
    most_tokens_per_day: float

    def usd_per_mtok(self, tokens_per_day: float) -> float:
        """At that many tokens a day, which may be no more than it can make."""
        return _MILLION * (self.fixed_usd_per_day / tokens_per_day + self.marginal_usd_per_token)


def device_cost(tokens_per_s: float, given: Assumptions) -> DeviceCost:
    """At utilisation u, that many of the most tokens, a million cost

    1e6 / (3600 tps) x [(price - resale) / (life_h u) + load kW x USD/kWh + idle kW x USD/kWh x (1 - u) / u].
    """
    per_day = (given.device_price_usd - given.resale_usd) / (given.years * _HOURS_PER_YEAR) * 24
    idle_per_day = given.idle_watts / 1000 * 24 * given.usd_per_kwh
    extra_kwh = max(0.0, given.load_watts - given.idle_watts) / 1000 / 3600 / tokens_per_s
    return DeviceCost(per_day + idle_per_day, extra_kwh * given.usd_per_kwh, _SECONDS_PER_DAY * tokens_per_s)


def rented_usd_per_mtok(usd_per_hour: float, tokens_per_s: float, utilisation: float) -> float:
    """A rented machine that makes `tokens_per_s` for that share of the hours that are paid."""
    return _MILLION * usd_per_hour / (3600 * tokens_per_s * utilisation)


def api_usd_per_mtok(usd_per_mtok_in: float, usd_per_mtok_out: float, work: Work) -> float:
    """Output, and the input that goes with it."""
    return usd_per_mtok_out + usd_per_mtok_in * work.prompt_tokens / work.output_tokens


def kwh_per_mtok(watts: float, tokens_per_s: float) -> float:
    """Energy of a million tokens at that power."""
    return _MILLION / tokens_per_s * watts / 1000 / 3600


@dataclass(frozen=True)
class BreakEven:
    """From how many tokens a day on the device is cheaper; None for never, and then why."""

    tokens_per_day: float | None
    why_never: str = ""


def break_even(device: DeviceCost, cloud_usd_per_mtok: float) -> BreakEven:
    """Against a price by the token: an API's, or that of a GPU which is rented only while it works."""
    saved = cloud_usd_per_mtok / _MILLION - device.marginal_usd_per_token
    if saved <= 0:
        return BreakEven(None, "the device's electricity alone costs more per token")
    tokens = device.fixed_usd_per_day / saved
    if tokens > device.most_tokens_per_day:
        return BreakEven(None, f"it would take {tokens:,.0f} tokens a day, and the device makes {_most(device)}")
    return BreakEven(tokens)


def _most(device: DeviceCost) -> str:
    return f"{device.most_tokens_per_day:,.0f} at most"
