"""What `plan` says: the answer in a sentence, named choices, what getting there takes, and what it all rests on.

Within 80 columns. `--json` has every candidate; here each scheme has three rows at most.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from pocketmoe.profiles.estimate.footprint import MIXED
from pocketmoe.profiles.plan.advice import nothing_fits
from pocketmoe.profiles.plan.making import Making
from pocketmoe.profiles.plan.plan import UNQUANTIZED, VERDICT_WORDS, Candidate, PlanReport
from pocketmoe.profiles.report.columns import aligned
from pocketmoe.sizes import in_words, range_words

_WIDTH = 80
_HEAD = ["scheme", "experts", "--memory", "tokens/s", "first", "then", "hits", "verdict"]
_HALF = 0.5
_NEAR = 1.03  # budgets that differ by less are one row
_NOTICED = 1.05  # times as fast: int8 caches that give less are the same row again


def plan_table(found: PlanReport) -> str:
    """The answer first, then what it rests on."""
    return "\n".join(
        [
            *_answer(found),
            "",
            *(line for line in (*_listed(_getting_there(found)), "") if found.recommended),
            *_listed(_facts(found)),
            "",
            *aligned([_HEAD, *map(_row, _shown(found))]),
            "",
            *_wrapped(
                f"Verdicts: {VERDICT_WORDS}. `experts`: the share of them in memory; `first`: first token, from a "
                "cold start; `then`: of the next prompt; `hits`: experts found in memory; +kv8: caches in int8. Speeds "
                "are predicted, from low to high; docs/PLAN.md has what such predictions were off by, and `profile` "
                "measures them."
            ),
        ]
    )


def _answer(found: PlanReport) -> list[str]:
    best, choices = found.recommended, found.advice
    if best is None:
        error = nothing_fits(found)
        return _wrapped(f"{error}. {error.remedy}")
    lines = _wrapped(
        f"On {_device(found)}, take {_name(best)} with --memory {_megabytes(best)}: {_speed(best)} tokens/s "
        f"({best.verdict}), the first after {_first(best)}, and {_seconds(best.speed.ttft_warm_s)} with the "
        "next prompt."
    )
    if found.loaded:
        lines += _wrapped("Others were at work while this machine was measured: take it as a guess, and ask again.")
    named: dict[Candidate, list[str]] = {}
    for what, choice in (
        ("fastest", choices.fastest),
        ("best quality", choices.best_quality),
        ("least memory", choices.least_memory),
    ):
        if choice is not None:
            named.setdefault(choice, []).append(what)
    rows = [
        [f"{', '.join(what)}:", _name(c), f"--memory {_megabytes(c)}", f"{_speed(c)} tokens/s"]
        for c, what in named.items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines += [
        "",
        *("  " + "  ".join(f"{cell:<{w}}" for cell, w in zip(row, [*widths, 0], strict=True)) for row in rows),
    ]
    return [*lines, "", *_wrapped(_rule(found)), *_wrapped(_quality(found, best))]


def _device(found: PlanReport) -> str:
    return "this machine" if found.device == "this" else found.device


def _rule(found: PlanReport) -> str:
    aim = found.advice.aimed_tokens_per_s
    if not aim:
        return "Nothing makes 3 tokens/s here, so this is the fastest there is."
    given = (
        f"the target of {aim:g} tokens/s" if found.target_tokens_per_s else f"{aim:g} tokens/s (no target was given)"
    )
    return f"Best quality and least memory are among what reaches {given}; best quality is taken."


def _quality(found: PlanReport, best: Candidate) -> str:
    return f"Quality of {_name(best)}: {best.quality} ({found.measured_on})."


def _getting_there(found: PlanReport) -> Iterator[tuple[str, str]]:
    best = found.recommended
    if best is None:
        return
    if found.making is not None:
        yield from _making(best, found.model, found.making)
    elif any(c.scheme == UNQUANTIZED for c in found.candidates):
        yield "quantize", " ".join(["pocketmoe quantize", found.model, "-o SMALL", *_options(best)])
    once, twice = in_words(best.bundle_bytes), in_words(best.bundle_bytes + best.packed_bytes)
    yield (
        "disk",
        (
            f"{once}, and {twice} once the first run has packed the experts for the CPU; "
            f"`pack --in-place` keeps it near {once}"
        ),
    )
    free = found.device_disk_free_bytes
    if free is not None and free < (found.making.disk_bytes if found.making else best.packed_bytes):
        yield "", f"here {in_words(free)} are free: too little"


def _making(best: Candidate, model: str, making: Making) -> Iterator[tuple[str, str]]:
    if making.download_bytes:
        yield "download", f"about {in_words(making.download_bytes)} ({making.basis})"
    yield "export", _command(best, model)
    yield (
        "",
        f"{_duration(making)} on this device (estimated), with {in_words(making.disk_bytes)} of disk in all; or on "
        "another machine, and the bundle copied",
    )


def _command(best: Candidate, model: str) -> str:
    """What makes the bundle; what goes by a text is a second step."""
    if best.scheme == MIXED:
        second = " ".join(["pocketmoe quantize BUNDLE -o SMALL", *_options(best)])
        return f"pocketmoe export {model} -o BUNDLE --scheme float32, then {second}"
    export = f"pocketmoe export {model} -o"
    if best.kv == "float32":
        return f"{export} SMALL --scheme {best.scheme}"
    second = "pocketmoe quantize BUNDLE -o SMALL --scheme keep --kv int8 --calibration TEXT"
    return f"{export} BUNDLE --scheme {best.scheme}, then {second}"


def _options(best: Candidate) -> Iterator[str]:
    """Of `quantize`."""
    yield f"--scheme {best.scheme}"
    if best.scheme == MIXED:
        yield f"--size-budget {best.bundle_bytes / 1e9:.3g}GB"
    if best.kv == "int8":
        yield "--kv int8"
    if best.scheme == MIXED or best.kv == "int8":
        yield "--calibration TEXT"


def _facts(found: PlanReport) -> Iterator[tuple[str, str]]:
    usable, total = in_words(found.usable_memory_bytes), in_words(found.device_memory_bytes)
    yield (
        "model",
        (
            f"{found.model}, {found.architecture}: {_count(found.parameters)} parameters, "
            f"{_count(found.active_parameters)} active (by {found.counted_from})"
        ),
    )
    yield "experts", f"{found.experts} in each of {found.moe_layers} layers, {found.experts_per_token} per token"
    yield "device", f"{found.device_title}; {usable} of {total} for the process"
    yield "", found.device_basis
    if found.device_note:
        yield "note", found.device_note
    yield "routing", found.routing
    yield "text", _text(found)


def _text(found: PlanReport) -> str:
    clamped = found.asked_context_tokens > found.context_tokens
    asked = f" ({found.asked_context_tokens} were asked for, the model has no more)" if clamped else ""
    cut = found.asked_prompt_tokens > found.prompt_tokens
    prompt = f" (of {found.asked_prompt_tokens} asked for)" if cut else ""
    at_once = f"; {found.sequences} texts at once, speeds are those of one" if found.sequences > 1 else ""
    return f"{found.context_tokens} tokens at most{asked}, {found.prompt_tokens} of them the prompt{prompt}{at_once}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} billion" if parameters >= 1e9 else f"{parameters / 1e6:.1f} million"


def _shown(found: PlanReport) -> list[Candidate]:
    """Of each scheme that fits the least, half of the experts, and the most; of others the least.

    Of one that a better scheme outruns, or that is slow where others are not, and of int8 caches, the most alone; of
    int8 caches that gain nothing, what is advised. Weights as they were trained only where nothing else is there.
    """
    groups: dict[tuple[str, str], list[Candidate]] = {}
    for candidate in found.candidates:
        groups.setdefault((candidate.scheme, candidate.kv), []).append(candidate)
    if len(groups) > 1:
        groups.pop((UNQUANTIZED, "float32"), None)
    shown: list[Candidate] = []
    fastest = 0.0
    is_slow = all(candidate.verdict == "slow" for candidate in found.candidates if candidate.fits)
    for (scheme, kv), group in groups.items():
        fitting = [candidate for candidate in group if candidate.fits]
        if fitting:
            most = fitting[-1]
            same = [candidate for candidate in groups.get((scheme, "float32"), ()) if candidate.fits]
            if kv == "int8" and same and most.speed.tokens_per_s < _NOTICED * same[-1].speed.tokens_per_s:
                shown += [candidate for candidate in fitting if candidate in _advised(found)]
                continue
            hopeless = most.verdict == "slow" and not is_slow
            shown += _rows_of(fitting, found, brief=kv == "int8" or hopeless or most.speed.tokens_per_s < fastest)
            fastest = max(fastest, most.speed.tokens_per_s)
        elif kv == "float32":
            shown.append(group[0])
    return shown


def _advised(found: PlanReport) -> tuple[Candidate | None, ...]:
    return found.advice.fastest, found.advice.best_quality, found.advice.least_memory


def _rows_of(fitting: list[Candidate], found: PlanReport, brief: bool) -> list[Candidate]:
    advised, most = _advised(found), fitting[-1]
    half = min(fitting, key=lambda c: abs(c.share - _HALF * most.share))
    rows: list[Candidate] = []
    for candidate in fitting:
        wanted = candidate in advised or candidate is most or (not brief and candidate in (fitting[0], half))
        again = rows and candidate.memory_bytes < _NEAR * rows[-1].memory_bytes and candidate not in advised
        if wanted and not again:
            rows.append(candidate)
    return rows


def _row(found: Candidate) -> list[str]:
    speed = found.speed
    return [
        _name(found),
        f"{found.share:.0%}",
        _megabytes(found),
        _speed(found).replace(" to ", "-"),
        _first(found).replace(" to ", "-"),
        _seconds(speed.ttft_warm_s),
        f"{_percent(speed.hit_rate_low, speed.hit_rate_high)}",
        found.verdict if found.fits else "no room",
    ]


def _name(found: Candidate) -> str:
    return found.scheme if found.kv == "float32" else f"{found.scheme}+kv8"


def _megabytes(found: Candidate) -> str:
    return f"{found.memory_bytes // 10**6 + 1}MB"


def _speed(found: Candidate) -> str:
    return range_words(found.speed.tokens_per_s_low, found.speed.tokens_per_s_high)


def _first(found: Candidate) -> str:
    return f"{range_words(found.speed.ttft_s_low, found.speed.ttft_s_high)} s"


def _percent(low: float, high: float) -> str:
    words = [f"{100 * value:.0f}" for value in (low, high)]
    return f"{words[0]}%" if words[0] == words[1] else f"{words[0]}-{words[1]}%"


def _seconds(seconds: float) -> str:
    if seconds < 0.1:
        return f"{1000 * seconds:.2g} ms"
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds:.0f} s"


def _duration(making: Making) -> str:
    low, high = making.export_s_low, making.export_s_high
    if high < 2 * 60:
        return f"{range_words(low, high)} seconds"
    unit, name = (3600.0, "hours") if low >= 2 * 3600 else (60.0, "minutes")
    return f"{range_words(round(low / unit) or 1, round(high / unit))} {name}"


def _listed(rows: Iterator[tuple[str, str]]) -> list[str]:
    """Names and what they are, wrapped beside the names."""
    named = list(rows)
    width = max((len(name) for name, _ in named), default=0) + 2
    return [line for name, value in named for line in _wrapped(value, f"{name:<{width}}", " " * width)]


def _wrapped(text: str, first: str = "", later: str = "") -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    ) or [first.rstrip()]
