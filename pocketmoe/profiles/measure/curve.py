"""What a profile keeps of a recorded routing: how many tokens chose each expert, how often one would be missing.

Neither says which token chose which experts, so neither tells what the text was.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.profiles.profile import CachePoint
from pocketmoe.profiles.profile import Routing as RoutingRecord
from pocketmoe.profiles.routing.policies import BELADY, LRU, POLICIES, Routing, routing_of, visit_hits
from pocketmoe.runtime.engine.memory_plan import possible_slots
from pocketmoe.runtime.paging.cache import ExpertCache
from pocketmoe.runtime.paging.expert_counts import summarize

_SHARES = (0.03, 0.0625, 0.09, 0.125, 0.19, 0.25, 0.31, 0.375, 0.44, 0.5, 0.625, 0.75, 0.875, 1.0)


def summarize_routing(
    ids: np.ndarray,
    experts: Sequence[int],
    prompt_walks: Sequence[int],
    slots: Sequence[int] = (),
    progress: Progress = no_progress,
) -> RoutingRecord:
    """Counts and the cache curve. ids: int [tokens, layers, top_k], -1 for none; `experts`: of each layer.

    `slots`: numbers of slots to replay beside those of the usual shares. Experts of several sizes count as one pool.
    """
    routing = routing_of(ids, experts, prompt_walks)
    counts = [
        np.bincount(row[row >= 0], minlength=count) for row, count in zip(ids.transpose(1, 0, 2), experts, strict=True)
    ]
    padded = np.stack([np.pad(row, (0, max(experts) - len(row))) for row in counts])
    even = summarize(padded, experts)
    assert even is not None, "a routing has tokens"
    first_answer = routing.n_prompt_steps * len(routing.experts)
    prompt = [visit.wanted for visit in routing.visits[:first_answer]]
    answer = [visit.wanted for visit in routing.visits[first_answer:]]
    return RoutingRecord(
        counts=tuple(tuple(row.tolist()) for row in counts),
        entropy=even.entropy,
        hottest_quarter=even.hottest_quarter,
        repeated=_repeated(ids[sum(prompt_walks) :]),
        new_experts=len({*np.concatenate(answer).tolist()} - {*np.concatenate(prompt).tolist()}),
        prompt_visits=first_answer,
        prompt_experts=sum(map(len, prompt)),
        curve=_curve(routing, first_answer, slots, progress),
    )


def _repeated(ids: np.ndarray) -> float:
    """Of a token's experts the share that the token before it chose too. ids: int [tokens, layers, top_k]."""
    again = (ids[1:, :, :, None] == ids[:-1, :, None, :]).any(axis=3) & (ids[1:] >= 0)
    return float(again.sum() / max(1, (ids[1:] >= 0).sum()))


def _curve(routing: Routing, first_answer: int, slots: Sequence[int], progress: Progress) -> tuple[CachePoint, ...]:
    total = sum(routing.experts.values())
    shares = [round(share * total) for share in _SHARES]
    wanted = np.array([len(visit.wanted) for visit in routing.visits])
    answer = wanted[first_answer:]
    points = sorted({possible_slots(n, total) for n in (*shares, *slots)})
    others = {name: POLICIES[name](routing, points)[:, routing.n_prompt_steps :].sum(axis=1) for name in (LRU, BELADY)}
    found: list[CachePoint] = []
    for place, n in enumerate(points):
        progress("replaying the routing", place, len(points))
        misses = wanted - visit_hits(ExpertCache(n, routing.experts, routing.width), routing)
        found.append(
            CachePoint(
                expert_slots=n,
                expert_share=n / total,
                hit_rate=1 - float(misses[first_answer:].sum() / answer.sum()),
                lru_hit_rate=float(others[LRU][place] / answer.sum()),
                belady_hit_rate=float(others[BELADY][place] / answer.sum()),
                prompt_reads=int(misses[:first_answer].sum()),
                visits_by_misses=tuple(np.bincount(misses[first_answer:]).tolist()),
            )
        )
    return tuple(found)
