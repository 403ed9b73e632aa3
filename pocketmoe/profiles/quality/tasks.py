"""Figures of lm-evaluation-harness' tasks, beside those of a reference, and the names that gates call them by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pocketmoe.profiles.quality.divergence import Estimate

_95 = 1.96  # standard errors, of a normal distribution

Figures = Mapping[str, Mapping[str, Estimate]]
"""Estimates by task and by the name that a gate calls them."""


@dataclass(frozen=True)
class TaskFigure:
    """One metric of one task, as the harness computes it; `stderr` None where it knows none.

    `reference`: the same of what the bundle is compared with; `change_stderr`: the standard error of the difference,
    example by example, where the metric has a figure for each. None where there is none.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    examples: int
    reference: float | None = None
    change_stderr: float | None = None

    @property
    def change(self) -> Estimate | None:
        """The bundle's figure less the reference's."""
        return None if self.reference is None else _estimate(self.value - self.reference, self.change_stderr)


def names_of(label: str, compared: bool) -> list[str]:
    """What gates call a metric: `acc`; with a reference also `acc_fall` and `acc_rise`, by how much it fell or rose.

    The harness' filters stand behind a comma, as it writes them itself: `exact_match_fall,strict-match`.
    """
    metric, _, kind = label.removesuffix(")").partition(" (")
    behind = f",{kind}" if kind else ""
    return [f"{metric}{change}{behind}" for change in ("", *(("_fall", "_rise") if compared else ()))]


def gated(metrics: Mapping[str, Sequence[str]], compared: bool) -> dict[str, list[str]]:
    """The names of all figures that there will be, by task."""
    return {task: [n for label in labels for n in names_of(label, compared)] for task, labels in metrics.items()}


def estimates(figures: Iterable[TaskFigure]) -> Figures:
    """The figures by those names."""
    found: dict[str, dict[str, Estimate]] = {}
    for figure in figures:
        own, change = _estimate(figure.value, figure.stderr), figure.change
        values = [own] if change is None else [own, _turned(change), change]
        found.setdefault(figure.task, {}).update(zip(names_of(figure.metric, change is not None), values, strict=True))
    return found


def _estimate(value: float, stderr: float | None) -> Estimate:
    return (
        Estimate(value, None, None) if stderr is None else Estimate(value, value - _95 * stderr, value + _95 * stderr)
    )


def _turned(change: Estimate) -> Estimate:
    low, high = (None if bound is None else 0.0 - bound for bound in (change.high, change.low))
    return Estimate(0.0 - change.value, low, high)  # never -0
