"""A profile as one HTML page that needs nothing else: pictures, a table for each, and where every number comes from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pocketmoe.bundle.files import write_whole
from pocketmoe.profiles.estimate.device_prediction import DevicePrediction, worst_error
from pocketmoe.profiles.estimate.predict import Checked, check_predictions, costs_here, predict
from pocketmoe.profiles.profile import Profile, Run
from pocketmoe.profiles.report import elsewhere, routing, storage
from pocketmoe.profiles.report.charts import Axis, Line, Mark, bar_chart, line_chart
from pocketmoe.profiles.report.columns import as_markup, varying
from pocketmoe.profiles.report.headline import BUSY, first_token_words, head, headline, knee, loaded, untouched
from pocketmoe.profiles.report.html import Markup, el, figure, page, table
from pocketmoe.profiles.report.profile_columns import MEASURED, ms
from pocketmoe.sizes import in_words

PARTS = (("experts", "a"), ("attention and head", "b"), ("Python", "d"), ("waiting for experts", "c"))
_GOAL = 0.15


def write_report(path: Path, profile: Profile, found: Sequence[DevicePrediction] = ()) -> None:
    """Put the page in place in one step. Raises OutputError."""
    write_whole(path, render(profile, found).encode())


def render(profile: Profile, found: Sequence[DevicePrediction] = ()) -> str:
    """The page. The profile must have a run."""
    full = untouched(profile)
    checked = check_predictions(profile)
    body = [
        *head(profile),
        el("div", _memory_latency(profile, full), _breakdown(full), class_="grid2"),
        _measurements(profile),
        el(
            "div",
            *routing.sections(profile, full),
            *storage.sections(profile),
            _bandwidth(profile, full),
            _limits(profile),
            class_="grid2",
        ),
        *elsewhere.sections(found),
        _predictions(checked),
        _about(profile),
    ]
    return page(f"{profile.model.name} on {profile.machine.cpu}", body)


def _memory_latency(profile: Profile, full: Sequence[Run]) -> Markup:
    unit = 1e9 if full[-1].memory_budget_bytes > 2e9 else 1e6
    here = costs_here(profile)
    slots, budgets = [run.expert_slots for run in full], [run.memory_budget_bytes / unit for run in full]
    curve = [
        (float(np.interp(point.expert_slots, slots, budgets)), predict(profile, here, point.expert_slots).tokens_per_s)
        for point in (profile.routing.curve if profile.routing else ())
        if slots[0] <= point.expert_slots <= slots[-1]
    ]
    lines = [Line("predicted", curve, "b", dashed=True)] if curve else []

    def measured(runs: Sequence[Run]) -> list[tuple[float, float]]:
        return [(run.memory_budget_bytes / unit, run.decode_tokens_per_s) for run in runs]

    busy = [run for run in full if loaded(run)]
    disturbed = "measured while others were busy"
    lines.append(Line(disturbed if busy else "measured", measured(full), "f" if busy else "a"))
    quiet = [run for run in full if not loaded(run)]
    dots = (("measured", quiet, "a"), (disturbed, busy, "f"))
    lines += [Line(name, measured(runs), colour, dots=True, joined=False) for name, runs, colour in dots if runs]
    at = knee(full)
    marks = [Mark(*measured([at])[0], f"knee: {in_words(at.memory_budget_bytes)}")] if len(full) > 1 else []
    chart = line_chart(
        lines,
        Axis("memory of the whole process, " + ("GB" if unit == 1e9 else "MB"), start=None),
        Axis("tokens per second"),
        f"Decoding speed against the memory budget. {headline(full)}",
        marks,
    )
    rows = [
        (
            run.memory,
            in_words(run.memory_budget_bytes),
            f"{run.decode_tokens_per_s:.2f}",
            ms(run.step_median_s),
            ms(run.step_p95_s),
        )
        for run in full
    ]
    numbers = table(("asked for", "memory", "tokens/s", "median step", "95th percentile"), rows)
    words = (
        "Measured, one process for each budget. Ring: the knee, the least memory that makes 90% of the fastest speed. "
        "Dashed: predicted from the budgets at both ends and the routing."
    )
    return figure("Memory against speed", chart, words, numbers)


def _breakdown(full: Sequence[Run]) -> Markup:
    def parts(run: Run) -> list[float]:
        step = run.step
        return [1e3 * run.step.mean_s * share for share in (step.experts, step.segments, step.python, step.waiting)]

    rows = [(f"{run.memory}", parts(run)) for run in full]
    chart = bar_chart(rows, PARTS, Axis("ms per token, mean"), "Where the time of a token goes")
    numbers = table(
        ("memory", *(f"{name}, ms" for name, _ in PARTS), "sum, ms"),
        [(name, *(f"{v:.2f}" for v in values), f"{sum(values):.2f}") for name, values in rows],
    )
    return figure("Where a token's time goes", chart, "Measured while decoding, means over the answer.", numbers)


def _measurements(profile: Profile) -> Markup:
    notes = {f"Energy {r.energy.label}: {r.energy.reason or r.energy.source}." for r in profile.runs}
    notes |= {f"Heat: {r.thermal.reason or r.thermal.source}." for r in profile.runs}
    checked = check_predictions(profile)
    columns, same = varying(MEASURED, checked)
    words = "Every figure is measured. tokens/s is one over the median step; hits and bytes per token are the answer's."
    if same:
        words += f" The same in every run: {', '.join(f'{title} {value}' for title, value in same)}."
    if any(loaded(run) for run in profile.runs):
        words += " In grey: measured while others were busy."
    return el(
        "section",
        el("h2", "All measurements"),
        el("p", words, class_="soft"),
        as_markup(columns, checked, lambda entry: loaded(entry.run)),
        *(el("p", note, class_="soft") for note in (first_token_words(profile), *sorted(notes))),
    )


def _bandwidth(profile: Profile, full: Sequence[Run]) -> Markup:
    rows = [(run.memory, [profile.bandwidth_share(run)]) for run in full]
    chart = bar_chart(
        rows, [("S-MBU", "a")], Axis("share of peak bandwidth", reach=1.0, percent=True), "S-MBU by budget"
    )
    numbers = table(
        ("memory", "S-MBU", "active bytes per token", "mean step"),
        [
            (run.memory, f"{share:.1%}", in_words(profile.active_bytes), ms(run.step.mean_s))
            for run, (_, (share,)) in zip(full, rows, strict=True)
        ],
    )
    words = (
        "S-MBU (MoE-CAP): bytes of the weights that a token computes with, and its caches, over time per token, as a "
        "share of what this memory gives when it is only read: "
        f"{profile.machine.ram_bytes_per_s / 1e9:.1f} GB/s, measured."
    )
    return figure("Use of the memory's bandwidth", chart, words, numbers)


def _limits(profile: Profile) -> Markup:
    machine, model = profile.machine, profile.model
    bound_ram = machine.ram_bytes_per_s / profile.active_bytes
    reads = [(f"{size_words(r.block_bytes)} x {r.in_flight}", [r.bytes_per_s / 1e6]) for r in machine.disk]
    expert = model.expert_read_bytes / profile.expert.read_more_s / 1e6
    reads.append(("one expert at a time", [expert]))
    chart = bar_chart(reads, [("reads", "c")], Axis("MB per second"), "Speed of disk reads by size")
    per_token = sum(model.experts_per_token) * model.expert_read_bytes
    speed = model.expert_read_bytes / profile.expert.read_more_s
    rows: list[tuple[object, ...]] = [(name, f"{value:.0f} MB/s") for name, (value,) in reads]
    rows += [
        ("memory, one thread", f"{machine.ram_one_thread_bytes_per_s / 1e9:.1f} GB/s"),
        ("memory, best", f"{machine.ram_bytes_per_s / 1e9:.1f} GB/s"),
        ("bound by memory, all experts there", f"{bound_ram:.1f} tokens/s (predicted)"),
    ]
    rows += [
        (f"bound by the disk at {hits:.0%} hits", f"{speed / (per_token * (1 - hits)):.1f} tokens/s (predicted)")
        for hits in (0.0, 0.25, 0.5, 0.75, 0.9)
    ]
    words = f"Measured: random reads by size and number under way. {machine.disk_problem}"
    if not machine.disk_direct:
        words += "This file system takes no direct reads: these went through the page cache."
    return figure("The limits of this machine", chart, words, table(("what", "speed"), rows))


def _predictions(checked: Sequence[Checked]) -> Markup:
    rows = [
        (
            c.run.memory,
            f"slowed to {in_words(c.run.read_bytes_per_s)}/s" if c.run.read_bytes_per_s else "as it is",
            f"{c.run.decode_tokens_per_s:.2f}",
            f"{c.prediction.tokens_per_s:.2f}",
            f"{c.error:+.1%}",
            "calibrated on" if c.calibrated else "predicted",
        )
        for c in checked
    ]
    return el(
        "section",
        el("h2", "Predicted against measured, on this machine"),
        el("p", error_words(checked), class_="soft"),
        table(("memory", "disk", "measured tokens/s", "predicted", "error", "this run was"), rows),
    )


def error_words(checked: Sequence[Checked]) -> str:
    """How far predictions are off here, in a sentence or two."""
    worst = worst_error(checked)
    if worst is None:
        return "There are no runs beside those that computing was calibrated on, so the predictions are untested here."
    verdict = "within" if worst <= _GOAL else "beyond"
    busy = max(c.run.others_cpu for c in checked)
    disturbed = (
        f" Others took up to {busy:.0%} of the processors meanwhile, which no prediction knows." if busy > BUSY else ""
    )
    return (
        f"At most {worst:.1%} off, {verdict} the goal of {_GOAL:.0%}. Computing was calibrated on the runs with the "
        "least and the most memory, the disk's speed is the median over the runs; hits and waits are predicted."
        + disturbed
    )


def _about(profile: Profile) -> Markup:
    machine, model = profile.machine, profile.model
    rows = [
        ("bundle", f"{model.name}, sha256 {model.bundle_sha256}"),
        ("schemes", ", ".join(f"{what} {scheme}" for what, scheme in model.schemes.items())),
        ("experts", f"{sum(model.experts)} in {len(model.experts)} layers, {sum(model.experts_per_token)} per token"),
        ("one expert", f"{in_words(model.expert_read_bytes)} on disk, {in_words(model.expert_slot_bytes)} in memory"),
        ("settings", f"{profile.settings.threads} threads, backend {profile.runs[0].backend}, "
                     f"prefetch {profile.settings.prefetch}"),
        ("machine", f"{machine.cpu} ({machine.architecture}: {', '.join(machine.features)}), {machine.system}"),
        ("software", ", ".join(f"{name} {version}" for name, version in machine.software.items())),
        ("slots", machine.slots_problem or "work"),
        ("same answer", "yes, at every budget" if len({r.tokens_sha256 for r in profile.runs}) == 1 else "NO: a bug"),
    ]  # fmt: skip
    return el("section", el("h2", "What was measured, and where"), el("div", table(("", ""), rows), class_="words"))


def size_words(nbytes: int) -> str:
    """A block's size."""
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"
