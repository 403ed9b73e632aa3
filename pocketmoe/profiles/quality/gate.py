"""Limits on an evaluation's figures: a release gate, by a file of the user's and by rules that always hold.

A file has one limit a line, `[scope:] metric <= number` (or >=, <, >), and comments from # on. A scope is a slice's
name, `overall` (which is meant without one), `worst` slice, `in_distribution` or `out_of_distribution`, or a task of
lm-evaluation-harness, whose metrics are named as the harness does, with `_fall` or `_rise` against the reference. It is
the figure that is held against the limit; its interval is shown beside it.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pocketmoe.bundle.files import read_text
from pocketmoe.errors import BadInput, GateFailed
from pocketmoe.profiles.quality.divergence import Estimate
from pocketmoe.profiles.quality.pairs import PairQuality, magnitude, worst_drift
from pocketmoe.profiles.quality.report import Quality, QualityReport
from pocketmoe.profiles.quality.tasks import Figures

_MAX_BYTES = 1 << 20
_NONE: Figures = {}
OVERALL, WORST, LIKE, UNLIKE = "overall", "worst", "in_distribution", "out_of_distribution"

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_LINE = re.compile(r"(?:(?P<scope>.+):)?\s*(?P<metric>\w+(?:,[\w.-]+)?)\s*(?P<sign><=|>=|<|>)\s*(?P<limit>\S+)")

# Limits of the built-in rules, and differences that are too small to break any.
_WORST_SLICE = 2.0  # times the overall KL
_LEAST_KL = 0.001  # nats, a tenth of a percent of perplexity: a slice with less breaks no rule
# Measured on the reference model in int4 (docs/LOG.md): its own answers 0.7 times the KL of given text, 0.08 nats of
# excess negative log-likelihood, less repetition. With noise of half a logit in single steps alone: 50 times the KL.
_FREE_KL = 10.0  # times the KL on given text
_LEAST_FREE_KL = 0.01  # nats
_MOST_EXCESS_NLL = 1.0  # nats per token
_MOST_EXCESS_REPETITION = 0.3  # of 4-grams
_MOST_LEVEL_KL = 0.05  # nats
_MOST_DRIFT = 0.25  # nats: the odds between the two sentences of a pair move by 28%


@dataclass(frozen=True)
class Rule:
    """One limit. `line` of its file, None where it is built in."""

    line: int | None
    scope: str
    metric: str
    sign: str
    limit: float
    of_task: bool = False

    def __str__(self) -> str:
        return f"{self.scope}: {self.metric} {self.sign} {self.limit:g}"


@dataclass(frozen=True)
class Verdict:
    """What a limit came to. `scope`: the slice that was judged, where the rule says `worst`."""

    rule: str
    line: int | None
    scope: str
    metric: str
    value: float | None  # None where it could not be told, which is a failure
    low: float | None  # of the 95% interval; None where there is none
    high: float | None
    limit: float
    passed: bool
    built_in: bool

    def __str__(self) -> str:
        value = "not known" if self.value is None else f"{self.value:.6g}"
        interval = "" if self.low is None or self.high is None else f" ({self.low:.4g} to {self.high:.4g})"
        where = f"line {self.line}: " if self.line else ""
        of = f" in {self.scope}" if not self.rule.startswith(f"{self.scope}:") else ""
        return f"{where}{self.rule}: {value}{interval}{of}, limit {self.limit:.4g}"


def _divergence(name: str) -> Callable[[Quality], Estimate | None]:
    return lambda quality: getattr(quality.divergence, name)


def _free(name: str) -> Callable[[Quality], Estimate | None]:
    return lambda quality: getattr(quality.free_running, name, None)


def _router_layer_min(quality: Quality) -> Estimate | None:
    layers = quality.divergence.router_agreement_by_layer if quality.divergence else ()
    return Estimate(min(layers), None, None) if layers else None


_ALONE: dict[str, Callable[[Quality], Estimate | None]] = {
    "perplexity": lambda quality: quality.perplexity,
    "bits_per_byte": lambda quality: quality.bits_per_byte,
}
_COMPARED: dict[str, Callable[[Quality], Estimate | None]] = {
    "perplexity_ratio": _divergence("perplexity_ratio"),
    "mean_kl": _divergence("mean_kl_nats"),
    "p99_kl": _divergence("p99_kl_nats"),
    "top1": _divergence("top1_agreement"),
    "router": _divergence("router_agreement"),
    "router_layer_min": _router_layer_min,
}
_ANSWERED: dict[str, Callable[[Quality], Estimate | None]] = {
    "free_same": _free("same_tokens"),
    "free_until_difference": _free("tokens_until_difference"),
    "free_kl": _free("mean_kl_nats"),
    "free_repetition": _free("repetition"),
    "free_excess_repetition": _free("excess_repetition"),
    "free_surprise": _free("nll_nats"),
    "free_excess_surprise": _free("excess_nll_nats"),
}
_OF_QUALITY = {**_ALONE, **_COMPARED, **_ANSWERED}
_OF_BUNDLE: dict[str, Callable[[QualityReport], float]] = {
    "bytes": lambda report: report.candidate_bytes,
    "touched_bytes": lambda report: report.candidate_touched_bytes_per_token,
}
_OF_PAIRS: dict[str, Callable[[PairQuality], Estimate | None]] = {
    "pair_gap": lambda found: magnitude(found.gap_nats),
    "pair_drift": lambda found: magnitude(found.drift_nats) if found.drift_nats else None,
    "pair_flips": lambda found: found.flips,
}
SLICE_GAP = "slice_gap"
METRICS = (*_OF_QUALITY, *_OF_BUNDLE, *_OF_PAIRS, SLICE_GAP)


@dataclass(frozen=True)
class Extent:
    """What an evaluation will have figures of, known before it begins; `prompts`: answered for each slice."""

    slices: Sequence[str]
    marked: bool  # some slices are out of distribution, and some are not
    compared: bool
    prompts: int
    kinds: Sequence[str] = ()  # of pairs of sentences
    tasks: Mapping[str, Collection[str]] = field(
        default_factory=dict[str, Collection[str]]
    )  # names of figures, by task

    def is_task(self, scope: str, metric: str) -> bool:
        """Whether a limit is about a task; a slice of that name is meant where the metric is one of texts."""
        return scope in self.tasks and not (metric in METRICS and scope in self.slices)


def read_gate(path: Path, extent: Extent) -> list[Rule]:
    """The rules of a file, checked against what will be measured: an hour's evaluation is not to end in a typing error.

    Raises BadInput, with the line, for what is no rule and for figures that there will not be.
    """
    lines = read_text(path, "Name a file of limits.", _MAX_BYTES).splitlines()
    wanted = [(number, line.partition("#")[0].strip()) for number, line in enumerate(lines, 1)]
    rules = [_parse(path, number, text, extent) for number, text in wanted if text]
    if not rules:
        raise BadInput(f"{path} has no limits", "Write one a line, as in: mean_kl <= 0.02.")
    return rules


def _parse(path: Path, number: int, text: str, extent: Extent) -> Rule:
    def refused(what: str, remedy: str) -> BadInput:
        return BadInput(f"{path}, line {number}: {what}", remedy)

    match = _LINE.fullmatch(text)
    if not match:
        raise refused(f"{text!r} is no limit", "Write it as in: mean_kl <= 0.02, or docs: p99_kl <= 0.3.")
    scope, metric = (match["scope"] or OVERALL).strip(), match["metric"]
    try:
        limit = float(match["limit"])
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit):
        raise refused(f"{match['limit']!r} is no number", "Give a number, as in: mean_kl <= 0.02.")
    wrong = _not_measured(metric, scope, extent)
    if wrong is not None:
        raise refused(*wrong)
    return Rule(number, scope, metric, match["sign"], limit, extent.is_task(scope, metric))


def _not_measured(metric: str, scope: str, extent: Extent) -> tuple[str, str] | None:
    """Why there will be no such figure, and what would do; None where there will be one."""
    if extent.is_task(scope, metric):
        return _not_of_task(metric, scope, extent)
    if metric not in METRICS:
        of = [task for task, names in extent.tasks.items() if metric in names]
        remedy = f"Say of which task, as in: {of[0]}: {metric} >= 0.5." if of else f"There are: {', '.join(METRICS)}."
        return f"there is no metric {metric!r}" + (" of texts" if of else ""), remedy
    if not extent.slices:
        return f"{metric} needs text", "Give --text TEXT."
    if metric in _OF_PAIRS and not extent.kinds:
        return f"{metric} needs pairs of sentences", "Give --pairs FILE."
    groups = [OVERALL, WORST, *([LIKE, UNLIKE] if extent.marked and metric not in _OF_PAIRS else [])]
    scopes = [*groups, *(extent.kinds if metric in _OF_PAIRS else extent.slices)]
    if scope not in scopes:
        what = "slice or task" if extent.tasks else "slice"
        return f"there is no {what} {scope!r}", f"There are: {', '.join([*scopes, *extent.tasks])}."
    if metric in (*_OF_BUNDLE, SLICE_GAP) and scope != OVERALL:
        return f"{metric} is one figure, not one of {scope!r}", f"Write it without {scope!r}."
    return _not_asked_for(metric, scope in groups, extent)


def _not_of_task(metric: str, task: str, extent: Extent) -> tuple[str, str] | None:
    names = extent.tasks[task]
    if metric in names:
        return None
    if not extent.compared and re.sub("_(fall|rise)(?=,|$)", "", metric) in names:
        return f"{metric} needs something to compare with", "Give --reference."
    return f"task {task} has no figure {metric!r}", f"It has: {', '.join(names)}."


def _not_asked_for(metric: str, grouped: bool, extent: Extent) -> tuple[str, str] | None:
    """The same of what an option must ask for."""
    if metric == SLICE_GAP and len(extent.slices) < 2:
        return "a gap needs two slices", "Give --text DIR with several *.txt."
    if metric not in (*_ALONE, *_OF_BUNDLE, "pair_gap", SLICE_GAP) and not extent.compared:
        return f"{metric} needs a bundle to compare with", "Give --reference."
    if metric in _ANSWERED and extent.prompts < (1 if grouped else len(extent.slices)):
        return f"{metric} needs prompts that are answered", f"Give --free {max(1, len(extent.slices))} or more."
    return None


def judge(report: QualityReport, rules: Sequence[Rule] = (), tasks: Figures = _NONE) -> list[Verdict]:
    """What each rule comes to, those of a file first; the built-in ones need a reference."""
    return [_judge(*_find(report, rule, tasks), rule) for rule in rules] + _built_in(report)


def judge_tasks(rules: Sequence[Rule], tasks: Figures) -> list[Verdict]:
    """What rules on tasks come to where no text was read."""
    return [_judge(rule.scope, tasks.get(rule.scope, {}).get(rule.metric), rule) for rule in rules]


def refuse_broken(verdicts: Sequence[Verdict]) -> None:
    """Raises GateFailed where a verdict is against the bundle, with the rows that broke."""
    broken = [verdict for verdict in verdicts if not verdict.passed]
    if broken:
        too_large = all(verdict.metric in _OF_BUNDLE for verdict in broken)
        raise GateFailed(
            f"{len(broken)} of {len(verdicts)} gates failed: {'; '.join(map(str, broken))}",
            "Quantize with fewer bits." if too_large else "Quantize with more bits, or look at the slices that broke.",
        )


def _judge(scope: str, found: Estimate | None, rule: Rule) -> Verdict:
    passed = found is not None and _OPERATORS[rule.sign](found.value, rule.limit)
    return _verdict(str(rule), rule.line, scope, rule.metric, found, rule.limit, passed)


def _find(report: QualityReport, rule: Rule, tasks: Figures) -> tuple[str, Estimate | None]:
    """The scope that is judged and its figure."""
    if rule.of_task:
        return rule.scope, tasks.get(rule.scope, {}).get(rule.metric)
    if rule.metric in _OF_BUNDLE:
        return rule.scope, Estimate(_OF_BUNDLE[rule.metric](report), None, None)
    if rule.metric == SLICE_GAP:
        return rule.scope, report.slice_gap.gap if report.slice_gap else None
    if rule.metric in _OF_PAIRS:
        return _find_pairs(report, rule)
    figure = _OF_QUALITY[rule.metric]
    slices = {piece.name: piece.quality for piece in report.slices}
    if rule.scope == WORST:
        found = [(name, estimate) for name, quality in slices.items() if (estimate := figure(quality)) is not None]
        if not found:
            return WORST, None
        worst = max if rule.sign.startswith("<") else min
        return worst(found, key=lambda pair: pair[1].value)
    groups = {OVERALL: report.overall, LIKE: report.in_distribution, UNLIKE: report.out_of_distribution}
    quality = groups[rule.scope] if rule.scope in groups else slices[rule.scope]
    return rule.scope, figure(quality) if quality else None


def _find_pairs(report: QualityReport, rule: Rule) -> tuple[str, Estimate | None]:
    figure, pairs = _OF_PAIRS[rule.metric], report.pairs
    if pairs is None:
        return rule.scope, None
    found = [(kind.kind, figure(kind)) for kind in pairs.kinds]
    if rule.scope == OVERALL:
        return OVERALL, figure(pairs.overall)
    if rule.scope != WORST:
        return rule.scope, dict(found)[rule.scope]
    known = [(kind, estimate) for kind, estimate in found if estimate is not None]
    return max(known, key=lambda pair: pair[1].value) if known else (WORST, None)


def _built_in(report: QualityReport) -> list[Verdict]:
    """The rules that hold for every comparison.

    The worst slice's mean KL is at most twice the overall one. The candidate's own answers stray no further from the
    reference than given text does, by a factor that only a broken path reaches; they are no garbage to the reference,
    and do not go in circles where the reference's do not. Each fails only when the whole interval is beyond its limit:
    a slice of a few windows, or some prompts, vary that much by chance, and a gate that nobody asked for must not stop
    a release by chance. Without an interval they pass. Rounding activations to int8 moves an answer by at most a limit
    that is a hundred times what it was measured to (docs/LOG.md): only a broken kernel reaches it. The gap between the
    sentences of a pair moves by a quarter of a nat at most, in any kind of them.
    """
    verdicts: list[Verdict] = []
    if report.overall.divergence is not None:
        kl = report.overall.divergence.mean_kl_nats.value
        verdicts.append(_worst_slice(report, max(_LEAST_KL, _WORST_SLICE * kl)))
        if report.overall.free_running is not None:
            limit = max(_LEAST_FREE_KL, _FREE_KL * kl)
            rule = f"overall: free_kl within {_FREE_KL:g} times mean_kl"
            verdicts.append(_own_answers(report, "free_kl", limit, rule))
            verdicts.append(_own_answers(report, "free_excess_surprise", _MOST_EXCESS_NLL))
            verdicts.append(_own_answers(report, "free_excess_repetition", _MOST_EXCESS_REPETITION))
    drift = worst_drift(report.pairs.kinds) if report.pairs else None
    if drift is not None:
        rule = f"worst: pair_drift <= {_MOST_DRIFT:g}"
        passed = not _beyond(drift[1], _MOST_DRIFT)
        verdicts.append(_verdict(rule, None, drift[0], "pair_drift", drift[1], _MOST_DRIFT, passed))
    if report.levels is not None:
        found = Estimate(report.levels.mean_kl_nats, None, None)
        rule = f"overall: level_kl <= {_MOST_LEVEL_KL:g}"
        verdicts.append(_verdict(rule, None, OVERALL, "level_kl", found, _MOST_LEVEL_KL, found.value <= _MOST_LEVEL_KL))
    return verdicts


def _worst_slice(report: QualityReport, limit: float) -> Verdict:
    metric = "mean_kl"
    figures = [(piece.name, _COMPARED[metric](piece.quality)) for piece in report.slices]
    found = [(name, estimate) for name, estimate in figures if estimate is not None]
    # The worst slice may have too wide an interval to break the rule where another does.
    beyond = [pair for pair in found if _beyond(pair[1], limit)]
    name, worst = max(beyond or found, key=lambda pair: pair[1].value)
    rule = f"worst: mean_kl within {_WORST_SLICE:g} times overall"
    return _verdict(rule, None, name, metric, worst, limit, not beyond)


def _own_answers(report: QualityReport, metric: str, limit: float, rule: str = "") -> Verdict:
    found = _ANSWERED[metric](report.overall)
    rule = rule or str(Rule(None, OVERALL, metric, "<=", limit))
    return _verdict(rule, None, OVERALL, metric, found, limit, not _beyond(found, limit))


def _beyond(found: Estimate | None, limit: float) -> bool:
    return found is not None and found.low is not None and found.low > limit


def _verdict(
    rule: str, line: int | None, scope: str, metric: str, found: Estimate | None, limit: float, passed: bool
) -> Verdict:
    value, low, high = (found.value, found.low, found.high) if found else (None, None, None)
    return Verdict(rule, line, scope, metric, value, low, high, limit, passed, built_in=line is None)
