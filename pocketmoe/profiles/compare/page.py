"""A comparison as one HTML page that needs nothing else: what it comes to, pictures with tables, and every source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pocketmoe.bundle.files import write_whole
from pocketmoe.profiles.compare import pictures
from pocketmoe.profiles.compare.columns import OPTIONS, grouped
from pocketmoe.profiles.compare.findings import usd
from pocketmoe.profiles.compare.offers import Option, chosen
from pocketmoe.profiles.compare.records import Comparison
from pocketmoe.profiles.report.columns import as_grouped_markup
from pocketmoe.profiles.report.html import Markup, el, page, table

PAGE = "compare.html"
_UNITS = {
    "device_price_usd": "price of the device, USD",
    "resale_usd": "what it brings at the end, USD",
    "years": "years of use",
    "utilisation": "share of the time in which the device makes tokens",
    "cloud_utilisation": "share of the hours paid in which a rented GPU does (by the second: all of them)",
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
    crossing, is_drawn = pictures.break_even(found, shown), pictures.crosses(found, shown)
    body = [
        *_head(found),
        el(
            "div",
            pictures.cost(shown),
            *([crossing] if is_drawn else []),
            pictures.speed(shown),
            pictures.energy(shown),
            class_="grid2",
        ),
        *([] if is_drawn else [crossing]),  # words alone would leave a hole beside a picture
        el("section", el("h2", "What it comes to"), el("ul", *map(_point, found.findings[1:]), class_="points")),
        _table("This device, GPUs where they are cheapest, and APIs", shown),
        *_measurement(found),
        _assumptions(found),
        _about(found),
        _all(found),
    ]
    return page(f"{found.model}: this device, rented GPUs, hosted APIs", body)


def _point(sentence: str) -> Markup:
    return el("li", sentence)


def _head(found: Comparison) -> Iterator[Markup]:
    device, work = found.device, found.work
    yield el(
        "h1",
        f"{found.model}: {device.tokens_per_s:.3g} tokens/s at {usd(device.usd_per_mtok)} per million tokens; "
        f"{found.verdict}",
    )
    yield el("p", found.findings[0], class_="lead")
    yield el("ul", *(el("li", el("b", value), what) for value, what in _tiles(found)), class_="tiles")
    yield el(
        "p",
        f"A million output tokens with their prompts: {work.prompt_tokens} tokens in, {work.output_tokens} out, again "
        f"and again. This device: {device.name} with {device.memory_budget_bytes / 1e6:,.0f} MB "
        f"({device.memory}). {found.created}.",
        class_="soft",
    )
    if found.warnings:
        yield el("ul", *(el("li", f"{words[0].upper()}{words[1:]}.") for words in found.warnings), class_="warn")


def _tiles(found: Comparison) -> Iterator[tuple[str, str]]:
    device = found.device
    yield f"{device.tokens_per_s:.3g}", f"tokens/s here, for one user ({device.basis})"
    yield usd(device.usd_per_mtok), f"per million tokens here, at {found.assumptions.utilisation:.0%} use"
    priced = [o for o in found.options if o.usd_per_mtok is not None]
    kinds = (
        ("from the cheapest API of this model", [o for o in priced if o.kind == "api" and o.same_model]),
        ("from the cheapest API, of another model", [o for o in priced if o.kind == "api" and not o.same_model]),
        ("on the cheapest GPU, shared", [o for o in priced if o.kind == "gpu" and o.same_model]),
    )
    for words, options in kinds:
        if options:
            cheapest = min(options, key=lambda o: o.usd_per_mtok or 0.0)
            yield usd(cheapest.usd_per_mtok or 0.0), f"per million tokens {words}: {cheapest.name}"


def _table(title: str, options: Sequence[Option]) -> Markup:
    return el("section", el("h2", title), as_grouped_markup(OPTIONS, grouped(options)))


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
        "under another workload and often of another model. Predicted: GPUs by the roofline model below, the device by "
        "a plan where nothing was measured. Confidence: V read in the source, M unverified, C computed."
    )
    return el("section", el("h2", "Where the numbers come from"), el("p", words), *(el("p", line) for line in lines))


def _all(found: Comparison) -> Markup:
    return el("details", el("summary", f"All {len(found.options)} offers"), _table("Everything", found.options))
