"""What `plan` says: the answer in a sentence, named choices, and the table that they were chosen from."""

from __future__ import annotations

from pocketmoe.profiles.plan.plan import UNQUANTIZED, VERDICT_WORDS, Candidate, PlanReport
from pocketmoe.profiles.report.columns import aligned
from pocketmoe.sizes import in_words, range_words

_HEAD = ["scheme", "experts", "--memory", "bundle", "hits", "tokens/s", "first token", "then", "read/token", "verdict"]


def plan_table(found: PlanReport) -> str:
    """The answer first, then what it rests on."""
    names = [(name, value) for name, value in _facts(found) if value]
    width = max(len(name) for name, _ in names)
    shown = _shown(found)
    return "\n".join(
        [
            *_answer(found),
            "",
            *(f"{name:<{width}}  {value}" for name, value in names),
            "",
            *aligned([[*_HEAD, ""], *map(_row, shown)]),
            "",
            f"Verdicts: {VERDICT_WORDS}. `first token` is from a cold start, `then` with the next prompt.",
            "All speeds are predicted, from low to high (docs/PLAN.md has what such predictions were off by); "
            "`profile` measures them.",
        ]
    )


def _answer(found: PlanReport) -> list[str]:
    best = found.recommended
    if best is None:
        return [f"{found.model} is not for {found.device_title} as asked."]
    lines = [
        f"Take {best.scheme} with --memory {_megabytes(best)}: {_speed(best)} tokens/s ({best.verdict}) on "
        f"{found.device_title}, first token after {_first(best)} from a cold start.",
        f"Quality of {best.scheme}: {best.quality}.",
    ]
    choices = [
        ("Fastest", found.advice.fastest),
        ("Best quality at the target", found.advice.best_quality),
        ("Least memory at the target", found.advice.least_memory),
    ]
    lines += [f"{what}: {_choice(choice)}." for what, choice in choices if choice]
    target = f"{found.target_tokens_per_s:g}" if found.target_tokens_per_s else "8 (none was given)"
    return [*lines, f"The target is {target} tokens/s; the advice is the best quality that reaches it."]


def _choice(found: Candidate) -> str:
    return f"{found.scheme} with --memory {_megabytes(found)}, {_speed(found)} tokens/s"


def _facts(found: PlanReport) -> list[tuple[str, str]]:
    size = f"{found.parameters / 1e9:.2f} billion parameters, {found.active_parameters / 1e9:.2f} active"
    usable, total = in_words(found.usable_memory_bytes), in_words(found.device_memory_bytes)
    clamped = found.asked_context_tokens > found.context_tokens
    at_once = f"; {found.sequences} texts at once" if found.sequences > 1 else ""
    asked = f" ({found.asked_context_tokens} were asked for, the model has no more)" if clamped else ""
    return [
        ("model", f"{found.model}, {found.architecture}: {size} (by {found.counted_from})"),
        ("experts", f"{found.experts} in each of {found.moe_layers} layers, {found.experts_per_token} per token"),
        ("device", f"{found.device_title}: {usable} of {total}"),
        ("", found.device_basis),
        ("", found.device_note),
        ("routing", found.routing),
        ("text", f"{found.context_tokens} tokens at most{asked}, {found.prompt_tokens} of them the prompt{at_once}"),
    ]


def _shown(found: PlanReport) -> list[Candidate]:
    """What fits, and the least of each scheme; weights as they were trained only where nothing else is there."""
    least = {candidate.scheme: candidate for candidate in reversed(found.candidates)}
    kept: set[str] = {found.recommended.scheme} if found.recommended else set()
    return [
        candidate
        for candidate in found.candidates
        if (candidate.scheme != UNQUANTIZED or UNQUANTIZED in kept or len(least) == 1)
        and (candidate.fits or candidate is least[candidate.scheme])
    ]


def _row(found: Candidate) -> list[str]:
    speed = found.speed
    return [
        found.scheme,
        f"{found.share:.0%}",
        in_words(found.memory_bytes),
        in_words(found.bundle_bytes),
        f"{100 * speed.hit_rate_low:.0f} to {speed.hit_rate_high:.0%}",
        _speed(found),
        _first(found),
        f"{speed.ttft_warm_s:.2g} s",
        in_words(speed.read_bytes_per_token),
        found.verdict,
        "" if found.fits else "does not fit",
    ]


def _megabytes(found: Candidate) -> str:
    return f"{found.memory_bytes // 10**6 + 1}MB"


def _speed(found: Candidate) -> str:
    return range_words(found.speed.tokens_per_s_low, found.speed.tokens_per_s_high)


def _first(found: Candidate) -> str:
    return f"{range_words(found.speed.ttft_s_low, found.speed.ttft_s_high)} s"
