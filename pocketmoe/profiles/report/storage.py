"""The section of a report that shows how experts are stored, where they are not all alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from pocketmoe.profiles.profile import Profile
from pocketmoe.profiles.report.charts import heat_map
from pocketmoe.profiles.report.html import Markup, figure, table


def sections(profile: Profile) -> Iterator[Markup]:
    """The plan of mixed precision, as it was carried out; nothing for a bundle whose experts are of one kind."""
    kinds = profile.model.expert_kinds
    if len(kinds) < 2 or not profile.model.expert_kind_of:
        return
    largest = max(kind.nbytes for kind in kinds)
    of_expert = profile.model.expert_kind_of
    rows = [[kinds[number].nbytes / largest for number in layer] for layer in of_expert]
    key = [
        (kind.nbytes / largest, f"{kind.nbytes / 1e3:.1f} kB: {_shortened(kind.scheme)}")
        for kind in sorted(kinds, key=lambda kind: kind.nbytes)
    ]
    chart = heat_map(rows, "expert", "layer", "How many bytes each expert takes, by layer", key)
    counts = Counter(number for layer in of_expert for number in layer)
    counts = Counter[int]()
    for layer, used in enumerate(profile.routing.counts if profile.routing else ()):
        for expert, count in enumerate(used):
            counts[of_expert[layer][expert]] += count
    total = max(1, sum(counts.values()))
    numbers = table(
        ("format of its matrices", "kB each", "experts", "of the choices here", "by layer"),
        [
            (
                kind.scheme,
                f"{kind.nbytes / 1e3:.1f}",
                counts[number],
                f"{counts[number] / total:.0%}" if counts else "unknown",
                " ".join(str(sum(n == number for n in layer)) for layer in of_expert),
            )
            for number, kind in sorted(enumerate(kinds), key=lambda item: item[1].nbytes)
        ],
    )
    words = "As the bundle has them: full colour is the largest. Which experts get more was decided by measured loss."
    yield figure("How experts are stored", chart, words, numbers)


def _shortened(scheme: str) -> str:
    return scheme if len(scheme) < 48 else f"{scheme[:46]}…"
