"""The section of a report on machines that are not at hand: one picture and one table for all, all of it predicted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pocketmoe.profiles.estimate.device_prediction import DevicePrediction
from pocketmoe.profiles.report.charts import Axis, Line, line_chart
from pocketmoe.profiles.report.columns import as_grouped_markup
from pocketmoe.profiles.report.html import Markup, el
from pocketmoe.profiles.report.profile_columns import PREDICTED
from pocketmoe.sizes import range_words

_COLOURS = "abcdef"


def sections(found: Sequence[DevicePrediction]) -> Iterator[Markup]:
    """Nothing where no device was asked for."""
    if not found:
        return
    drawn = found[: len(_COLOURS)]
    lines = [_line(prediction, colour) for prediction, colour in zip(drawn, _COLOURS, strict=False)]
    axes = Axis("share of the experts in memory", percent=True, reach=1.0), Axis("tokens per second, predicted")
    best = [(prediction, prediction.budgets[-1]) for prediction in found]
    said = "; ".join(
        f"{prediction.title}: {range_words(budget.tokens_per_s_low, budget.tokens_per_s_high)}"
        for prediction, budget in best
    )
    assumed = dict.fromkeys(assumption for prediction in found for assumption in prediction.assumptions)
    sources = [el("li", f"{p.title}: {'; '.join(dict.fromkeys(p.sources))}.") for p in found]
    yield el(
        "section",
        el("h2", "Predicted on other machines"),
        el("p", f"Tokens/s with the most that fits: {said}. None of it is measured."),
        el("figure", line_chart(lines, *axes, f"Predicted speed on other machines. {said}"), el("figcaption", _WORDS)),
        as_grouped_markup(PREDICTED, [(prediction.title, prediction.budgets) for prediction in found]),
        el("p", f"Assumed: {'; '.join(assumed)}.", class_="soft"),
        el("details", el("summary", "Where the devices' figures come from"), el("ul", *sources, class_="soft")),
    )


_WORDS = "The band is the range that the speed is expected in; the line its middle."


def _line(found: DevicePrediction, colour: str) -> Line:
    shares = [(budget.prediction.expert_share, budget) for budget in found.budgets]
    return Line(
        found.title,
        [(share, budget.prediction.tokens_per_s) for share, budget in shares],
        colour,
        dashed=True,
        dots=True,
        band=[(share, budget.tokens_per_s_low, budget.tokens_per_s_high) for share, budget in shares],
    )
