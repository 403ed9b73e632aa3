"""The pictures of a comparison: cost, break-even, speed and energy, each with its numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pocketmoe.profiles.compare.columns import grouped, users
from pocketmoe.profiles.compare.offers import ASSUMED_POWER, TOY_PARAMETERS, Option, price
from pocketmoe.profiles.compare.records import Comparison
from pocketmoe.profiles.report.charts import Axis, Line, Mark, bar_chart, far_apart, line_chart
from pocketmoe.profiles.report.html import Markup, el, figure, table

_BASES = (("measured", "a"), ("predicted", "b"), ("published", "d"))
_PRICES = (("price of this model", "c"), ("price of another model", "f"))
_POWERS = (("power measured", "a"), ("power estimated", "d"), ("the GPU's power limit", "b"), ("watts assumed", "e"))
_MOST_BARS = 14
_LINES = ("c", "b", "d", "e", "f")
_OWN_MODELS = ("openai", "anthropic", "google")  # that nobody else sells: what most buyers pay today
_LOGARITHMIC = " The scale is logarithmic: each step is ten times the one before."


def cost(shown: Sequence[Option]) -> Markup:
    """What a million tokens cost, with those of another model in a colour of their own."""
    return _bars(
        "What a million tokens cost",
        [(option, option.usd_per_mtok) for option in _few([o for o in shown if o.same_model or o.kind == "api"])],
        "USD per million output tokens",
        (*_BASES, *_PRICES),
        _price_basis,
        "Prices are looked up; a GPU's price per token also stands on its speed, which is measured, predicted or "
        "published as the colour says. 1 user: rented for one alone; else shared by so many.",
        "USD per million tokens",
        ".3g",
    )


def speed(shown: Sequence[Option]) -> Markup:
    """Tokens per second that one user gets, of this model alone."""
    return _bars(
        "How fast for each user",
        [(option, option.tokens_per_s_per_user) for option in _few([o for o in shown if o.same_model])],
        "tokens per second and user",
        _BASES,
        lambda option: option.basis,
        "Of this model only. APIs publish no speed that anyone vouches for.",
        "tokens/s",
        ".1f",
    )


def energy(shown: Sequence[Option]) -> Markup:
    """Energy of a million tokens, by how the power is known."""
    return _bars(
        "Energy",
        [(option, option.kwh_per_mtok) for option in _few([o for o in shown if o.same_model])],
        "kWh per million output tokens",
        _POWERS,
        _power_basis,
        "For GPUs their power limit, without the machine and its cooling; for the device the power that was measured "
        "or, where it tells none, the watts assumed below.",
        "kWh per million tokens",
        ".3g",
    )


def _price_basis(option: Option) -> str:
    if option.kind == "api":
        return _PRICES[0][0] if option.same_model else _PRICES[1][0]
    return option.basis


def _power_basis(option: Option) -> str:
    if option.kind == "gpu":
        return _POWERS[2][0]
    if option.energy_basis == ASSUMED_POWER:
        return _POWERS[3][0]
    return _POWERS[0][0] if option.energy_basis == "measured" else _POWERS[1][0]


def _few(options: Sequence[Option]) -> list[Option]:
    """What a picture has room for: in turn the device, GPUs for one and for many, APIs of this model and of others."""
    groups = [
        [o for o in options if o.kind == "device"],
        [o for o in options if o.kind == "gpu" and o.users == 1],
        [o for o in options if o.kind == "gpu" and o.users != 1],
        [o for o in options if o.kind == "api" and o.same_model],
        sorted(
            (o for o in options if o.kind == "api" and not o.same_model), key=lambda o: o.provider not in _OWN_MODELS
        ),
    ]
    taken: list[Option] = []
    for place in range(max(map(len, groups), default=0)):
        taken += [group[place] for group in groups if place < len(group)]
    kept = {id(option) for option in taken[:_MOST_BARS]}
    return [option for option in options if id(option) in kept]


def _bars(
    title: str,
    rows: Sequence[tuple[Option, float | None]],
    axis: str,
    parts: Sequence[tuple[str, str]],
    part_of: Callable[[Option], str],
    words: str,
    unit: str,
    form: str,
) -> Markup:
    known = [(option, value) for option, value in rows if value is not None]
    if not known:
        return el("section", el("h2", title), el("p", "Nothing is known of this.", class_="soft"))
    used = [(name, colour) for name, colour in parts if any(part_of(option) == name for option, _ in known)]
    bars = [(short(option), [value if part_of(option) == name else 0.0 for name, _ in used]) for option, value in known]
    log = far_apart([value for _, value in known])
    picture = bar_chart(bars, used, Axis(axis, log=log), title)
    numbers = table(
        ("", unit, "users", "known how"),
        [(option.name, f"{value:{form}}", users(option), part_of(option)) for option, value in known],
    )
    return figure(title, picture, words + (_LOGARITHMIC if log else ""), numbers)


def short(option: Option) -> str:
    """A name that a picture has room for."""
    if option.kind == "device":
        return "this device"
    if option.kind == "api":
        return option.provider if option.same_model else f"{option.provider} {option.model}"
    many = "1 user" if option.users == 1 else f"{option.users or 'many'} users"
    name = "endpoint" if option.basis == "measured" else option.gpu.replace("GB", "") or option.name
    return f"{name}, {many}"


def crosses(found: Comparison, shown: Sequence[Option]) -> bool:
    """Whether the device pays from some number of tokens on, so that there is something to draw."""
    return found.parameters >= TOY_PARAMETERS and any(o.break_even_tokens_per_day is not None for o in shown)


def break_even(found: Comparison, shown: Sequence[Option]) -> Markup:
    """USD per day against tokens per day, as far as the device gets: the crossings, and apart what never crosses."""
    title = "From how many tokens a day the device pays"
    priced = [o for o in shown if o.kind != "device" and o.usd_per_mtok is not None]
    won = [o for o in priced if o.break_even_tokens_per_day is not None]
    lost = [o for o in priced if o.break_even_tokens_per_day is None]
    if found.parameters < TOY_PARAMETERS:
        return el("section", el("h2", title), el("p", "Not reckoned: the model is a toy, for which nobody would pay."))
    if not won:
        why = sorted({o.never for o in lost if "tokens a day" not in o.never} or {"the device cannot make enough"})
        none = f"From none: {'; '.join(why)}." if lost else "There is no price to hold against it."
        return el("section", el("h2", title), el("p", none), *_never(lost))
    device, drawn = found.device, _drawn(won)
    # As far as the last crossing is far from the axis, and never beyond what the device can make.
    reach = min(device.most_tokens_per_day, 1.6 * max(map(_even, drawn))) / 1e6
    own = [(x, device.fixed_usd_per_day + x * device.marginal_usd_per_mtok) for x in (0.0, reach)]
    top = 2.2 * max(own[1][1], *(_even(o) / 1e6 * price(o) for o in drawn))
    lines, marks = [Line("this device", own, "a")], list[Mark]()
    for number, (option, colour) in enumerate(zip(drawn, _LINES, strict=False), 1):
        usd, at = price(option), _even(option) / 1e6
        name = f"{number}: {short(option)}{'' if option.same_model else ' (another model)'}, from {1e6 * at:,.0f} a day"
        end = min(reach, top / usd)
        lines.append(Line(name, [(0.0, 0.0), (end, end * usd)], colour, dashed=True))
        marks.append(Mark(at, at * usd, str(number)))
    axes = Axis("million output tokens per day", end=reach), Axis("USD per day", end=top)
    picture = line_chart(lines, *axes, "What a day costs against how many tokens are made", marks)
    words = (
        "A ring marks where another line crosses the device's: from there on the device is cheaper. It can make "
        f"{device.most_tokens_per_day:,.0f} tokens a day at most. Of each kind of offer the cheapest that is crossed."
    )
    numbers = table(
        ("against", "users", "model", "break-even, tokens per day"),
        [(o.name, users(o), "this" if o.same_model else "another", f"{_even(o):,.0f}") for o in sorted(won, key=_even)],
    )
    shown_here = figure(title, picture, words, numbers)
    return el("div", shown_here, *([el("section", el("h2", "Never cheaper than"), *_never(lost))] if lost else []))


def _drawn(won: Sequence[Option]) -> list[Option]:
    """The cheapest of each kind, which is the hardest to undercut."""
    return [rows[0] for _, rows in grouped(won)][: len(_LINES)]


def _even(option: Option) -> float:
    return option.break_even_tokens_per_day or 0.0


def _never(lost: Sequence[Option]) -> list[Markup]:
    """Those that never cross, each with the reason."""
    if not lost:
        return []
    rows = [(o.name, users(o), f"{o.usd_per_mtok:.3g}", o.never) for o in lost]
    numbers = table(("", "users", "USD per million tokens", "why never"), rows)
    return [el("details", el("summary", f"{len(rows)} offers that the device never undercuts"), numbers)]
