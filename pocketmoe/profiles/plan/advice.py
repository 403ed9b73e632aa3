"""The choice among candidates, by a rule that is said with it; and what would do where none will."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pocketmoe.errors import NothingFits
from pocketmoe.profiles.estimate.classes import Machine
from pocketmoe.profiles.estimate.footprint import Footprint
from pocketmoe.profiles.estimate.hit_curve import HitCurve
from pocketmoe.profiles.plan.plan import (
    AIMS,
    UNQUANTIZED,
    Advice,
    Candidate,
    PlanReport,
    Remedy,
    predict,
    verdict_of,
)
from pocketmoe.sizes import in_words

_AS_GOOD = 0.95  # of the fastest: more memory for less than that is not worth it
_MOST = 1 << 44


def advise(found: Sequence[Candidate], target: float | None) -> Advice:
    """Named choices of those that fit, weights as they were trained never among them."""
    fitting = [c for c in found if c.fits and c.scheme != UNQUANTIZED]
    wanted = aimed_at(fitting, target)
    enough = [c for c in fitting if c.speed.tokens_per_s >= wanted] if wanted else []
    best = [c for c in enough if (c.scheme, c.kv) == (enough[0].scheme, enough[0].kv)]  # they come the best first
    return Advice(
        fastest=_in_least_memory(fitting),
        best_quality=_in_least_memory(best),
        least_memory=min(enough, key=lambda c: c.memory_bytes, default=None),
        aimed_tokens_per_s=wanted,
    )


def aimed_at(fitting: Sequence[Candidate], target: float | None) -> float:
    """The target; where none was given, 8 tokens/s, or 3 where nothing makes 8, or 0 where nothing makes 3."""
    if target is not None:
        return target
    most = max((c.speed.tokens_per_s for c in fitting), default=0.0)
    return next((aim for aim in AIMS if most >= aim), 0.0)


def _in_least_memory(found: Sequence[Candidate]) -> Candidate | None:
    """Of those that are about as fast as the fastest the best in quality, and of that the one in least memory."""
    most = max((c.speed.tokens_per_s for c in found), default=0.0)
    fast = [c for c in found if c.speed.tokens_per_s >= _AS_GOOD * most]
    best = [c for c in fast if (c.scheme, c.kv) == (fast[0].scheme, fast[0].kv)]  # they come the best first
    return min(best, key=lambda c: c.memory_bytes, default=None)


def recommend(advice: Advice) -> Candidate | None:
    """The best quality that reaches the target; where nothing is usable, and no target was given, the fastest."""
    return advice.best_quality if advice.aimed_tokens_per_s else advice.fastest


def remedy(
    footprints: Sequence[Footprint],
    hits: HitCurve,
    machine: Machine,
    context: int,
    prompt_tokens: int,
    target: float | None,
) -> Remedy:
    """For the fastest scheme: the least memory that would do on this disk, and the slowest disk with this memory."""
    wanted = target if target is not None else AIMS[-1]
    quantized = [f for f in footprints if f.scheme != UNQUANTIZED] or footprints
    smallest = min(quantized, key=lambda f: f.least_bytes(context))
    least = smallest.least_bytes(context)
    at_least = predict(smallest, max(0.0, smallest.share_in(least, context)), hits, machine, prompt_tokens)
    fastest = max(quantized, key=lambda f: predict(f, 1.0, hits, machine, prompt_tokens).tokens_per_s)

    def speed_in(memory: float, on: Machine = machine) -> float:
        share = fastest.share_in(memory, context)
        return predict(fastest, share, hits, on, prompt_tokens).tokens_per_s if share >= 0 else 0.0

    def speed_from(disk: float) -> float:
        on = replace(machine, disk=((float(fastest.expert_bytes), disk),))
        return speed_in(machine.usable_bytes, on)

    needed = _least(lambda memory: speed_in(memory) >= wanted, _MOST)
    disk = _least(lambda rate: speed_from(rate) >= wanted, _MOST)
    kept = machine.memory_bytes - machine.usable_bytes
    return Remedy(
        scheme=fastest.scheme,
        memory_bytes=None if needed is None else int(needed + kept),
        disk_bytes_per_s=disk,
        most_tokens_per_s=predict(fastest, 1.0, hits, machine, prompt_tokens).tokens_per_s,
        wanted_tokens_per_s=wanted,
        all_memory_bytes=int(fastest.budget_bytes(1.0, context) + kept),
        least_memory_bytes=int(least + kept),
        least_tokens_per_s=at_least.tokens_per_s,
        kv=fastest.kv,
    )


def nothing_fits(report: PlanReport) -> NothingFits:
    """What to say when there is no recommendation: why, and what would do."""
    found = report.remedy
    assert found is not None, "without a recommendation there is a remedy"
    would = _would_do(found)
    fitting = [c for c in report.candidates if c.fits and c.scheme != UNQUANTIZED]
    if not fitting:
        speed, most = found.least_tokens_per_s, found.most_tokens_per_s
        at_all = (
            f"{in_words(found.least_memory_bytes)} of memory in all would run it at about {_digits(speed)} tokens/s"
        )
        if not would:
            would = f"more memory makes it {_digits(most)} ({verdict_of(most)}) at most, with all experts in it"
        return NothingFits(
            f"{report.model} does not fit {report.device}, which has {in_words(report.device_memory_bytes)} of memory",
            f"{at_all} ({verdict_of(speed)}); {would} (predicted).",
        )
    best = max(c.speed.tokens_per_s for c in fitting)
    why = f"{report.model} on {report.device} would reach {_digits(best)} tokens/s of {found.wanted_tokens_per_s:g}"
    if would:
        return NothingFits(why, f"{would[0].upper()}{would[1:]} (predicted).")
    most = (
        f"{_digits(found.most_tokens_per_s)} tokens/s with all experts in memory ({in_words(found.all_memory_bytes)})"
    )
    return NothingFits(
        why,
        f"No memory or disk would do: it makes {most}; ask for less, or take a faster machine (predicted).",
    )


def _would_do(found: Remedy) -> str:
    ways: list[str] = []
    if found.memory_bytes is not None:
        ways.append(f"{in_words(found.memory_bytes)} of memory in all with this disk")
    if found.disk_bytes_per_s is not None:
        ways.append(f"a disk that reads {found.disk_bytes_per_s / 1e9:.2g} GB/s with this memory")
    scheme = found.scheme if found.kv == "float32" else f"{found.scheme} with int8 caches"
    return f"{scheme} would make {found.wanted_tokens_per_s:g} with {', or with '.join(ways)}" if ways else ""


def _digits(tokens_per_s: float) -> str:
    return f"{tokens_per_s:.2g}" if tokens_per_s < 10 else f"{tokens_per_s:.0f}"


def _least(enough: Callable[[float], bool], most: float) -> float | None:
    """The least value that is enough, to a thousandth, where more is never worse; None when `most` is not."""
    if not enough(most):
        return None
    low, high = 1.0, most
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
