"""The columns of the ways to get tokens, and the groups that they stand in."""

from __future__ import annotations

from collections.abc import Sequence

from pocketmoe.profiles.compare.offers import Option, number, price, seconds
from pocketmoe.profiles.report.columns import Column


def users(option: Option) -> str:
    """How many are served at once, where that is known."""
    return "-" if option.users is None else str(option.users)


def _break_even(option: Option) -> str:
    return "never" if option.never else number(option.break_even_tokens_per_day, ",.0f")


def _source(option: Option) -> str:
    return f"{option.latency_source}: {option.how}" if option.latency_source else option.how


OPTIONS: tuple[Column[Option], ...] = (
    Column("", lambda option: option.name),
    Column("USD per million tokens", lambda option: number(option.usd_per_mtok, ".3g")),
    Column("tokens/s each", lambda option: number(option.tokens_per_s_per_user, ".1f")),
    Column("first token", lambda option: seconds(option.ttft_s)),
    Column("users", users),
    Column("break-even, tokens/day", _break_even),
    Column("speed is", lambda option: option.basis),
    Column("model", lambda option: option.model + ("" if option.same_model else " (another)"), brief=False),
    Column("spot", lambda option: number(option.spot_usd_per_mtok, ".3g"), brief=False),
    Column("tokens/s of all", lambda option: number(option.tokens_per_s, ".1f"), brief=False),
    Column("kWh per million", lambda option: number(option.kwh_per_mtok, ".3g"), brief=False),
    Column("around the clock", lambda option: number(option.usd_per_month, ",.0f", " USD/month"), brief=False),
    Column("from", _source, brief=False),
    Column("price from", lambda option: option.price_source, brief=False),
    Column("of", lambda option: option.price_as_of, brief=False),
    Column("confidence", lambda option: option.price_confidence, brief=False),
)


def group_of(option: Option) -> str:
    """What a buyer would call it."""
    if option.kind == "device":
        return "This device"
    if option.kind == "api":
        return "APIs that sell this model" if option.same_model else "APIs that sell other models"
    if option.basis == "measured":
        return "The endpoint, measured"
    if not option.same_model:
        return "Rented GPUs with other models, as published"
    return "Rented GPUs, for one user" if option.users == 1 else "Rented GPUs, kept busy by many"


_ORDER = (
    "This device",
    "The endpoint, measured",
    "APIs that sell this model",
    "Rented GPUs, for one user",
    "Rented GPUs, kept busy by many",
    "APIs that sell other models",
    "Rented GPUs with other models, as published",
)


def grouped(options: Sequence[Option]) -> list[tuple[str, list[Option]]]:
    """Groups that have something, each by price; the budgets of the device as they are."""
    found = [(name, [option for option in options if group_of(option) == name]) for name in _ORDER]
    return [(name, rows if name == _ORDER[0] else sorted(rows, key=price)) for name, rows in found if rows]
