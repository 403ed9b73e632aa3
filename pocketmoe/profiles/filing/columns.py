"""The columns of an evaluation's tables: of text that was given, of answers, of gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from pocketmoe.profiles.quality.divergence import Estimate
from pocketmoe.profiles.quality.free_running import FreeRunning
from pocketmoe.profiles.quality.gate import LIKE, OVERALL, UNLIKE, Verdict
from pocketmoe.profiles.quality.pairs import PairQuality
from pocketmoe.profiles.quality.report import Divergence, Quality, QualityReport, SliceGap
from pocketmoe.profiles.quality.tasks import TaskFigure
from pocketmoe.profiles.report.columns import Column
from pocketmoe.sizes import in_words


class Scored(NamedTuple):
    """A slice, or several together, and its figures."""

    name: str
    quality: Quality


def scored(report: QualityReport) -> list[Scored]:
    """The rows of an evaluation: its slices, what is like calibration and what is not, and all; * is out of it."""
    rows = [Scored(f"{s.name}*" if s.out_of_distribution else s.name, s.quality) for s in report.slices]
    rows += [Scored(LIKE, report.in_distribution)] if report.in_distribution else []
    rows += [Scored(f"{UNLIKE}*", report.out_of_distribution)] if report.out_of_distribution else []
    return [*rows, Scored(OVERALL, report.overall)]


def _interval(found: Estimate, form: str) -> str:
    return f"{found.low:{form}} to {found.high:{form}}" if found.low is not None else "-"


def _compared(title: str, cell: Callable[[Divergence], str]) -> Column[Scored]:
    return Column(title, lambda row: cell(row.quality.divergence) if row.quality.divergence else "-")


def _answered(title: str, cell: Callable[[FreeRunning], str]) -> Column[Scored]:
    return Column(title, lambda row: cell(row.quality.free_running) if row.quality.free_running else "-")


GIVEN: Sequence[Column[Scored]] = (
    Column("text", lambda row: row.name),
    Column("tokens", lambda row: str(row.quality.scored_tokens)),
    Column("perplexity", lambda row: f"{row.quality.perplexity.value:.3f}"),
    Column("95% interval", lambda row: _interval(row.quality.perplexity, ".2f")),
    Column("bits/byte", lambda row: f"{row.quality.bits_per_byte.value:.3f}"),
)
COMPARED: Sequence[Column[Scored]] = (
    *GIVEN,
    _compared("ratio", lambda found: f"{found.perplexity_ratio.value:.4f}"),
    _compared("mean KL", lambda found: f"{found.mean_kl_nats.value:.5f}"),
    _compared("interval", lambda found: _interval(found.mean_kl_nats, ".4f")),
    _compared("99% KL", lambda found: f"{found.p99_kl_nats.value:.4f}"),
    _compared("top-1", lambda found: f"{found.top1_agreement.value:.1%}"),
    _compared("router", lambda found: f"{found.router_agreement.value:.1%}" if found.router_agreement else "-"),
)
ANSWERS: Sequence[Column[Scored]] = (
    Column("own answers", lambda row: row.name),
    _answered("prompts", lambda found: str(found.prompts)),
    _answered("tokens", lambda found: str(found.tokens)),
    _answered("same", lambda found: f"{found.same_tokens.value:.1%}"),
    _answered("interval", lambda found: _interval(found.same_tokens, ".0%")),
    _answered("until other", lambda found: f"{found.tokens_until_difference.value:.1f}"),
    _answered("KL", lambda found: f"{found.mean_kl_nats.value:.4f}"),
    _answered("repeats", lambda found: f"{found.repetition.value:.0%}"),
    _answered("own nll", lambda found: f"{found.nll_nats.value:.2f}"),
    _answered("excess", lambda found: f"{found.excess_nll_nats.value:+.2f}"),
)
PAIRS: Sequence[Column[PairQuality]] = (
    Column("pairs of sentences", lambda row: row.kind),
    Column("pairs", lambda row: str(row.pairs)),
    Column("gap, nats", lambda row: f"{row.gap_nats.value:+.3f}"),
    Column("95% interval", lambda row: _interval(row.gap_nats, "+.2f")),
    Column("a likelier", lambda row: f"{row.prefers_a.value:.0%}"),
    Column("reference", lambda row: f"{row.reference_gap_nats.value:+.3f}" if row.reference_gap_nats else "-"),
    Column("drift", lambda row: f"{row.drift_nats.value:+.4f}" if row.drift_nats else "-"),
    Column("interval", lambda row: _interval(row.drift_nats, "+.3f") if row.drift_nats else "-"),
    Column("flipped", lambda row: f"{row.flips.value:.1%}" if row.flips else "-"),
)
TASKS: Sequence[Column[TaskFigure]] = (
    Column("task", lambda row: row.task),
    Column("metric", lambda row: row.metric),
    Column("value", lambda row: f"{row.value:.4f}"),
    Column("standard error", lambda row: "-" if row.stderr is None else f"{row.stderr:.4f}"),
    Column("examples", lambda row: str(row.examples)),
)
COMPARED_TASKS: Sequence[Column[TaskFigure]] = (
    *TASKS,
    Column("reference", lambda row: "-" if row.reference is None else f"{row.reference:.4f}"),
    Column("change", lambda row: f"{row.change.value:+.4f}" if row.change else "-"),
    Column("95% interval", lambda row: _interval(row.change, "+.3f") if row.change else "-"),
)
GATES: Sequence[Column[Verdict]] = (
    Column("gate", lambda found: f"{found.rule} (built in)" if found.built_in else found.rule),
    Column("", lambda found: "ok" if found.passed else "FAILED"),
    Column("measured", lambda found: measured(found)),
    Column("95% interval", lambda found: f"{found.low:.3g} to {found.high:.3g}" if found.low is not None else "-"),
    Column("of", lambda found: found.scope),
)


def measured(found: Verdict) -> str:
    """A verdict's figure: four digits, bytes in words."""
    if found.value is None:
        return "not known"
    return in_words(int(found.value)) if found.metric.endswith("bytes") else f"{found.value:.4g}"


def pair_rows(report: QualityReport) -> list[PairQuality]:
    """Each kind of pairs, and all together where there are several."""
    if report.pairs is None:
        return []
    return [*report.pairs.kinds, *([report.pairs.overall] if len(report.pairs.kinds) > 1 else [])]


def gap_words(found: SliceGap) -> str:
    """The worst slice, the best, and how far apart they are."""
    unit = "nats" if found.metric == "mean_kl" else "bits a byte"
    low, high = found.gap.low, found.gap.high
    sure = f" ({low:.4f} to {high:.4f} with 95%)" if low is not None and high is not None else ""
    return f"the worst slice is {found.worst}, the best {found.best}: {found.gap.value:.4f} {unit} apart{sure}"


def facts(report: QualityReport) -> list[str]:
    """What the figures are of, a line each."""
    lines = [f"{report.window_tokens} tokens per window", _bytes_line(report)]
    if report.slice_gap:
        lines.append(gap_words(report.slice_gap))
    if report.reference_bytes:
        lines[0] += "; KL and nll (negative log-likelihood) in nats"
    if report.overall.divergence and report.overall.divergence.router_agreement_by_layer:
        layers = report.overall.divergence.router_agreement_by_layer
        lines.append(f"router by layer: {' '.join(f'{share:.1%}' for share in layers)}")
    if report.candidate_accuracy_levels:
        lines.append(f"accuracy level {' and '.join(map(str, report.candidate_accuracy_levels))}")
    if report.levels:
        lines[-1] += (
            f": {report.levels.same_tokens:.0%} of {report.levels.tokens} greedy tokens are those of level 0, "
            f"KL {report.levels.mean_kl_nats:.4f}"
        )
    decode = report.seen.candidate_decode_tokens_per_s
    own = f", {decode:.0f} of its own" if decode else ""
    lines.append(f"seen in passing, no benchmark: {report.seen.candidate_tokens_per_s:.0f} tokens/s of text{own}")
    if any(piece.out_of_distribution for piece in report.slices):
        lines.append("* out of distribution")
    return lines


def _bytes_line(report: QualityReport) -> str:
    touched = in_words(report.candidate_touched_bytes_per_token)
    line = f"{in_words(report.candidate_bytes)}, of which a token touches {touched}"
    if report.reference_bytes is not None and report.reference_touched_bytes_per_token is not None:
        theirs = in_words(report.reference_touched_bytes_per_token)
        line += f"; the reference {in_words(report.reference_bytes)} and {theirs}"
    return line
