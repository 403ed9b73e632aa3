"""The sections of a report that show the routing: who is used, how evenly, and what a cache makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pocketmoe.profiles.profile import Profile, Routing, Run
from pocketmoe.profiles.report.charts import Axis, Line, heat_map, line_chart
from pocketmoe.profiles.report.html import Markup, figure, table

_QUANTILES = (0.0625, 0.125, 0.25, 0.5, 0.75, 1.0)


def sections(profile: Profile, full: Sequence[Run]) -> Iterator[Markup]:
    """A section for each picture; none where the profile has no routing."""
    routing = profile.routing
    if routing is not None:
        yield _heat(routing)
        yield _skew(routing)
        yield _cache(routing, full)


def _heat(routing: Routing) -> Markup:
    rows = [[use / max(1, *row) for use in row] for row in routing.counts]
    chart = heat_map(rows, "expert", "layer", "How often each expert was used, by layer")
    numbers = table(
        ("layer", "experts", "used", "most used expert", "its share", "all choices, expert by expert"),
        [
            (
                layer,
                len(row),
                sum(use > 0 for use in row),
                int(np.argmax(row)),
                f"{max(row) / max(1, sum(row)):.1%}",
                " ".join(map(str, row)),
            )
            for layer, row in enumerate(routing.counts)
        ],
    )
    words = "Measured: tokens of prompt and answer that chose each expert; full colour is the most used of its layer."
    return figure("Who is used", chart, words, numbers)


def _skew(routing: Routing) -> Markup:
    ranked = [np.sort(np.asarray(row, float))[::-1] for row in routing.counts]
    grid = np.linspace(0, 1, 33)
    taken = [np.interp(grid, np.arange(len(r) + 1) / len(r), np.cumsum([0, *r]) / max(1.0, r.sum())) for r in ranked]
    mean, low, high = np.mean(taken, axis=0), np.min(taken, axis=0), np.max(taken, axis=0)

    def line(name: str, values: np.ndarray, colour: str, dashed: bool = False) -> Line:
        return Line(name, [*zip(grid.tolist(), values.tolist(), strict=True)], colour, dashed)

    chart = line_chart(
        [
            line("even", grid, "d", True),
            line("most even layer", low, "b"),
            line("least even layer", high, "c"),
            line("mean of the layers", mean, "a"),
        ],
        Axis("share of a layer's experts, most used first", percent=True),
        Axis("share of its choices", percent=True),
        "How uneven the routing is",
    )
    picked = [round(q * 32) for q in _QUANTILES]
    numbers = table(
        ("most used experts", "mean of the layers", "most even", "least even"),
        [(f"{grid[i]:.1%}", f"{mean[i]:.1%}", f"{low[i]:.1%}", f"{high[i]:.1%}") for i in picked],
    )
    words = (
        f"Measured. Entropy {routing.entropy:.0%} of the highest possible; the most used quarter of the experts takes "
        f"{routing.hottest_quarter:.0%} of the choices; {routing.repeated:.0%} of a token's experts were chosen by the "
        "token before it."
    )
    return figure("How uneven the routing is", chart, words, numbers)


def _cache(routing: Routing, full: Sequence[Run]) -> Markup:
    curve = routing.curve
    shown = [
        Line("the best possible (Belady)", [(p.expert_share, p.belady_hit_rate) for p in curve], "d", dashed=True),
        Line("least recently used", [(p.expert_share, p.lru_hit_rate) for p in curve], "c"),
        Line("this runtime, replayed", [(p.expert_share, p.hit_rate) for p in curve], "b"),
        Line(
            "measured, with prefetch",
            [(r.expert_share, r.hit_rate + r.prefetch_hit_rate) for r in full],
            "a",
            dots=True,
            joined=False,
        ),
    ]
    chart = line_chart(
        shown,
        Axis("share of the experts in memory", percent=True),
        Axis("hits", reach=1.0, percent=True),
        "Hit rate against the share of experts in memory",
    )
    numbers = table(
        ("experts in memory", "share", "this runtime", "least recently used", "best possible", "missing per visit"),
        [
            (
                p.expert_slots,
                f"{p.expert_share:.1%}",
                f"{p.hit_rate:.1%}",
                f"{p.lru_hit_rate:.1%}",
                f"{p.belady_hit_rate:.1%}",
                f"{_mean(p.visits_by_misses):.2f}",
            )
            for p in curve
        ],
    )
    words = "Replayed from the recorded routing of this workload, from an empty cache; the dots are measured."
    return figure("What a cache makes of it", chart, words, numbers)


def _mean(counts: Sequence[int]) -> float:
    """Of 0, 1, 2, ... that were counted so often."""
    return float(np.dot(counts, np.arange(len(counts)))) / max(1, sum(counts))
