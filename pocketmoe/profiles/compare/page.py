"""A comparison as one HTML page that needs nothing else: what it comes to, pictures with tables, and every source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pocketmoe.bundle.files import write_whole
from pocketmoe.profiles.compare.columns import OPTIONS, users
from pocketmoe.profiles.compare.findings import usd
from pocketmoe.profiles.compare.offers import Option, chosen
from pocketmoe.profiles.compare.records import Comparison
from pocketmoe.profiles.report.charts import Axis, Line, bar_chart, line_chart
from pocketmoe.profiles.report.columns import as_markup
from pocketmoe.profiles.report.html import Markup, el, figure, page, table

PAGE = "compare.html"
_BASES = (("measured", "a"), ("predicted", "b"), ("published", "d"), ("price only", "c"))
_MOST_BARS = 12
_LINES = ("a", "c", "b", "d", "e")
_UNITS = {
    "device_price_usd": "price of the device, USD",
    "resale_usd": "what it brings at the end, USD",
    "years": "years of use",
    "utilisation": "share of the time in which the device makes tokens",
    "cloud_utilisation": "share of the hours paid in which a rented GPU does",
    "usd_per_kwh": "electricity, USD per kWh",
    "load_watts": "watts of the device at work",
    "idle_watts": "watts of the device at rest, all day",
    "users": "users at once on a GPU that is kept busy, at most",
}


def write_page(path: Path, found: Comparison) -> None:
    """Put the page in place in one step. Raises OutputError."""
    write_whole(path, render(found).encode())


def render(found: Comparison) -> str:
    """The page."""
    shown = chosen(found.options)
    body = [
        *_head(found),
        el("section", el("h2", "What it comes to"), *(el("p", sentence) for sentence in found.findings)),
        el("div", _cost(shown), _break_even(found, shown), _speed(shown), _energy(shown), class_="grid2"),
        _table("This device, GPUs where they are cheapest, and APIs", shown),
        *_measurement(found),
        _assumptions(found),
        _about(found),
        _all(found),
    ]
    return page(f"{found.model}: this device, rented GPUs, hosted APIs", body)


def _head(found: Comparison) -> Iterator[Markup]:
    device, work = found.device, found.work
    cheapest = [o for o in found.options if o.kind != "device" and o.usd_per_mtok is not None]
    yield el("h1", f"{found.model}: here, on a rented GPU, or from an API")
    yield el(
        "p",
        f"A million output tokens with their prompts: {work.prompt_tokens} tokens in, {work.output_tokens} out, again "
        f"and again. This device: {device.name} with {device.memory_budget_bytes / 1e6:,.0f} MB "
        f"({device.memory}). {found.created}.",
        class_="soft",
    )
    tiles = [
        (usd(device.usd_per_mtok), f"a million here, at {found.assumptions.utilisation:.0%} use"),
        (f"{device.tokens_per_s:.1f}", "tokens/s here, for one user (measured)"),
    ]
    for kind, words in (("api", "a million from the cheapest API"), ("gpu", "a million from the cheapest GPU, shared")):
        prices = [o.usd_per_mtok or 0.0 for o in cheapest if o.kind == kind and (o.same_model or kind == "api")]
        if prices:
            tiles.append((usd(min(prices)), words))
    yield el("ul", *(el("li", el("b", value), what) for value, what in tiles), class_="tiles")
    for warning in found.warnings:
        yield el("p", f"{warning[0].upper()}{warning[1:]}.", class_="warn")


def _cost(shown: Sequence[Option]) -> Markup:
    priced = [o for o in shown if o.usd_per_mtok is not None and (o.same_model or o.kind == "api")]
    return _bars(
        "What a million tokens cost",
        [(option, option.usd_per_mtok or 0.0) for option in _few(priced)],
        Axis("USD per million output tokens"),
        "Prices are looked up; a GPU's price per token also stands on its speed, which is measured, predicted or "
        "published as the colour says. 1 user: paid while it works for one; else kept busy by so many. Of this model, "
        "but for APIs, which may not sell it.",
        "USD per million",
        lambda value: f"{value:.3g}",
    )


def _speed(shown: Sequence[Option]) -> Markup:
    rated = [option for option in shown if option.tokens_per_s_per_user is not None and option.same_model]
    return _bars(
        "How fast for each user",
        [(option, option.tokens_per_s_per_user or 0.0) for option in _few(rated)],
        Axis("tokens per second and user"),
        "Of this model only. The device is measured. APIs publish no speed that anyone vouches for.",
        "tokens/s",
        lambda value: f"{value:.1f}",
    )


def _energy(shown: Sequence[Option]) -> Markup:
    known = [option for option in shown if option.kwh_per_mtok is not None and option.same_model]
    return _bars(
        "Energy",
        [(option, option.kwh_per_mtok or 0.0) for option in _few(known)],
        Axis("kWh per million output tokens"),
        "Estimated: for GPUs their power limit, without the machine and its cooling; for the device the power measured "
        "or, where it tells none, assumed. The colour says how the speed is known.",
        "kWh per million",
        lambda value: f"{value:.3g}",
    )


def _few(options: Sequence[Option]) -> list[Option]:
    """What a picture has room for: the device, then by price, of GPUs, those kept busy and APIs in turn."""
    groups = [
        [o for o in options if o.kind == "device"],
        [o for o in options if o.kind == "gpu" and o.users == 1],
        [o for o in options if o.kind == "gpu" and o.users != 1],
        [o for o in options if o.kind == "api"],
    ]
    taken: list[Option] = []
    for place in range(max(map(len, groups), default=0)):
        taken += [group[place] for group in groups if place < len(group)]
    kept = {id(option) for option in taken[:_MOST_BARS]}
    return [option for option in options if id(option) in kept]


def _bars(title: str, rows: Sequence[tuple[Option, float]], axis: Axis, words: str, unit: str, shown: object) -> Markup:
    if not rows:
        return el("section", el("h2", title), el("p", "Nothing is known of this.", class_="soft"))
    used = [(name, colour) for name, colour in _BASES if any(option.basis == name for option, _ in rows)]
    bars = [(_short(option), [value if option.basis == name else 0.0 for name, _ in used]) for option, value in rows]
    assert callable(shown)
    numbers = table(("", "users", unit, "speed is"), [(o.name, users(o), shown(value), o.basis) for o, value in rows])
    return figure(title, bar_chart(bars, used, axis, title), words, numbers)


def _short(option: Option) -> str:
    if option.kind == "device":
        return option.name
    if option.kind == "api":
        return option.name.replace(": ", " ")
    users = "1 user" if option.users == 1 else f"{option.users or 'many'} users"
    return f"{option.gpu.replace('GB', '') or option.name}, {users}"


def _break_even(found: Comparison, shown: Sequence[Option]) -> Markup:
    """USD per day against tokens per day, up to what the device can make."""
    device = found.device
    most = device.most_tokens_per_day
    own = [
        (0.0, device.fixed_usd_per_day),
        (most / 1e6, device.fixed_usd_per_day + most / 1e6 * device.marginal_usd_per_mtok),
    ]
    lines = [Line("this device", own, "a")]
    lines += [
        Line(_short(option), [(0.0, 0.0), (most / 1e6, most / 1e6 * option.usd_per_mtok)], colour, dashed=True)
        for option, colour in zip(_cheapest(shown), _LINES[1:], strict=False)
        if option.usd_per_mtok is not None
    ]
    picture = line_chart(
        lines,
        Axis("million output tokens per day"),
        Axis("USD per day"),
        "What a day costs against how many tokens are made",
    )
    priced = [option for option in shown if option.kind != "device" and option.usd_per_mtok is not None]
    numbers = table(("against", "users", "break-even, tokens per day"), [(o.name, users(o), even(o)) for o in priced])
    words = (
        f"Where the device's line crosses another, it begins to be cheaper. It ends at {most:,.0f} tokens a day, the "
        "most that this device can make; a GPU rented around the clock costs its rent at any number."
    )
    return figure("From how many tokens a day the device pays", picture, words, numbers)


def _cheapest(shown: Sequence[Option]) -> list[Option]:
    """The cheapest API, GPU for one user and shared GPU, and the API in the middle: lines that tell something."""
    groups = [
        [o for o in shown if o.kind == "api"],
        [o for o in shown if o.kind == "gpu" and o.users == 1 and o.same_model],
        [o for o in shown if o.kind == "gpu" and (o.users or 0) > 1 and o.same_model],
    ]
    found = [min(group, key=lambda o: o.usd_per_mtok or 0.0) for group in groups if group]
    if groups[0]:
        found.append(sorted(groups[0], key=lambda o: o.usd_per_mtok or 0.0)[len(groups[0]) // 2])
    return list(dict.fromkeys(found))


def even(option: Option) -> str:
    """Tokens a day, or never and why."""
    if option.break_even_tokens_per_day is not None:
        return f"{option.break_even_tokens_per_day:,.0f}"
    return f"never: {option.never}" if option.never else "-"


def _table(title: str, options: Sequence[Option]) -> Markup:
    return el("section", el("h2", title), as_markup(OPTIONS, options))


def _measurement(found: Comparison) -> Iterator[Markup]:
    record = found.measurement
    if record is None:
        return
    rows = [
        (
            level.users,
            level.requests,
            f"{level.ttft_median_s:.3f} s",
            f"{level.ttft_p95_s:.3f} s",
            f"{level.tokens_per_s_per_user:.1f}",
            f"{1000 * level.step_p95_s:.1f} ms",
            f"{level.tokens_per_s:.1f}",
            f"{level.prompt_tokens:.0f} / {level.output_tokens:.0f}",
        )
        for level in record.levels
    ]
    head = (
        "users", "requests", "first token", "95th percentile", "tokens/s each", "95th percentile between two",
        "tokens/s of all", "tokens in / out",
    )  # fmt: skip
    words = (
        f"{record.model} at {record.url}, {record.api}, {record.measured_at}; tokens counted by the {record.counted_by}"
    )
    notes = "; ".join(record.notes)
    yield el(
        "section",
        el("h2", "The endpoint, measured"),
        el("p", words + (f"; {notes}." if notes else "."), class_="soft"),
        table(head, rows),
    )


def _assumptions(found: Comparison) -> Markup:
    rows = [(words, f"{getattr(found.assumptions, name):g}") for name, words in _UNITS.items()]
    device = found.device
    rows += [
        ("comes to: fixed, USD per day", f"{device.fixed_usd_per_day:.3f}"),
        ("comes to: electricity above resting, USD per million", f"{device.marginal_usd_per_mtok:.3f}"),
        (f"power of the device is {device.watts_basis}, W", f"{device.watts:.1f}"),
    ]
    return el(
        "section",
        el("h2", "Assumed"),
        el("p", "None of this is measured; each has its option.", class_="soft"),
        table(("what", "value"), rows),
    )


def _about(found: Comparison) -> Markup:
    lines = [*found.roofline, *(f"Left out: {what}." for what in found.skipped)]
    words = (
        "Measured: profile.json of this device, and the endpoint where one was given. Published: by who is named, "
        "under another workload and often of another model. Predicted: the roofline model below. Confidence: V read in "
        "the source, M unverified, C computed."
    )
    return el("section", el("h2", "Where the numbers come from"), el("p", words), *(el("p", line) for line in lines))


def _all(found: Comparison) -> Markup:
    return el("details", el("summary", f"All {len(found.options)} offers"), _table("Everything", found.options))
