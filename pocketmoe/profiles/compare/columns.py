"""The columns of the ways to get tokens."""

from __future__ import annotations

from pocketmoe.profiles.compare.offers import Option
from pocketmoe.profiles.report.columns import Column


def users(option: Option) -> str:
    """How many are served at once, where that is known."""
    return "-" if option.users is None else str(option.users)


def number(value: float | None, form: str, unit: str = "") -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value:{form}}{unit}"


def _break_even(option: Option) -> str:
    return "never" if option.never else number(option.break_even_tokens_per_day, ",.0f")


def _source(option: Option) -> str:
    return f"{option.latency_source}: {option.how}" if option.latency_source else option.how


OPTIONS: tuple[Column[Option], ...] = (
    Column("", lambda option: option.name),
    Column("model", lambda option: option.model + ("" if option.same_model else " (another)"), brief=False),
    Column("users", users),
    Column("USD per million", lambda option: number(option.usd_per_mtok, ".3g")),
    Column("spot", lambda option: number(option.spot_usd_per_mtok, ".3g"), brief=False),
    Column("first token", lambda option: number(option.ttft_s, ".2f", " s")),
    Column("tokens/s each", lambda option: number(option.tokens_per_s_per_user, ".1f")),
    Column("tokens/s of all", lambda option: number(option.tokens_per_s, ".1f"), brief=False),
    Column("kWh per million", lambda option: number(option.kwh_per_mtok, ".3g"), brief=False),
    Column("around the clock", lambda option: number(option.usd_per_month, ",.0f", " USD/month"), brief=False),
    Column("break-even, tokens/day", _break_even),
    Column("speed is", lambda option: option.basis + ("" if option.same_model else ", another model")),
    Column("from", _source, brief=False),
    Column("price from", lambda option: option.price_source, brief=False),
    Column("of", lambda option: option.price_as_of, brief=False),
    Column("confidence", lambda option: option.price_confidence, brief=False),
)
