"""Which format each part of a model gets: a multiple-choice knapsack over measured losses. Records in, choices out.

Each part (an expert, a class of dense tensors) takes one of its options; losses add up, and so do bytes. That is an
integer program with one constraint per budget, which HiGHS solves to a proven gap (scipy.optimize.milp).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import scipy.sparse

_GAP = 1e-3  # of the least loss: what the choice may be worse by
_SECONDS = 60.0


@dataclass(frozen=True)
class Option:
    """One way to store a part. `kind` names what the runtime has to know apart; None where that does not matter."""

    label: str
    nbytes: int
    fetched_bytes: float  # per token, in expectation: the share of tokens that choose the part, times its bytes
    loss: float  # expected KL divergence of the next token, in nats
    kind: str | None = None


@dataclass(frozen=True)
class Budgets:
    """What all parts together may take; None for no limit."""

    nbytes: int | None = None
    fetched_bytes: float | None = None


class BudgetImpossible(Exception):
    """Even the smallest options take more; `least_bytes` and `least_fetched_bytes` are what they take."""

    def __init__(self, least_bytes: int, least_fetched_bytes: float) -> None:
        super().__init__(least_bytes, least_fetched_bytes)
        self.least_bytes = least_bytes
        self.least_fetched_bytes = least_fetched_bytes


def allocate(parts: Sequence[Sequence[Option]], budgets: Budgets, most_kinds: int) -> list[Option]:
    """The option of each part that together lose least within the budgets, with at most `most_kinds` kinds.

    The program does not know of kinds: it is solved with all of them, then without the one that fewest parts chose,
    until few enough are left. Raises BudgetImpossible.
    """
    smallest = [min(options, key=lambda option: option.nbytes) for options in parts]
    must_stay = {option.kind for option in smallest}
    dropped: set[str | None] = set()
    while True:
        chosen = _solve([_worthwhile(options, dropped) for options in parts], budgets)
        if chosen is None:
            raise BudgetImpossible(sum(o.nbytes for o in smallest), sum(o.fetched_bytes for o in smallest))
        used = Counter(option.kind for option in chosen if option.kind is not None)
        if len(used) <= most_kinds:
            return chosen
        droppable = [kind for kind in used if kind not in must_stay] or list(used)
        dropped.add(min(droppable, key=lambda kind: (used[kind], str(kind))))


def _worthwhile(options: Sequence[Option], dropped: Collection[str | None]) -> list[Option]:
    """Those of the kinds that are left that no smaller one beats, smallest first."""
    left: list[Option] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.loss, option.fetched_bytes)):
        if option.kind in dropped:
            continue
        if not left or option.loss < left[-1].loss:
            left.append(option)
    return left


def _solve(parts: Sequence[Sequence[Option]], budgets: Budgets) -> list[Option] | None:
    """None where the budgets cannot be met."""
    options = [option for part in parts for option in part]
    part_of = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    each_once = scipy.sparse.csr_array((np.ones(len(options)), (part_of, np.arange(len(options)))))
    constraints = [scipy.optimize.LinearConstraint(each_once, 1, 1)]
    for limit, sizes in (
        (budgets.nbytes, [float(option.nbytes) for option in options]),
        (budgets.fetched_bytes, [option.fetched_bytes for option in options]),
    ):
        if limit is not None:
            row = np.array(sizes) / max(1.0, limit)  # about 1: solvers dislike large numbers
            constraints.append(scipy.optimize.LinearConstraint(row[None, :], -np.inf, min(1.0, float(limit))))
    losses = np.array([option.loss for option in options])
    found = scipy.optimize.milp(
        losses / max(losses.max(), 1e-30),
        integrality=np.ones(len(options)),
        bounds=scipy.optimize.Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
    )
    if found.x is None:
        return None
    starts = np.cumsum([0, *(len(part) for part in parts)])
    picks = [int(np.argmax(found.x[start:stop])) for start, stop in itertools.pairwise(starts)]
    return [part[pick] for part, pick in zip(parts, picks, strict=True)]
