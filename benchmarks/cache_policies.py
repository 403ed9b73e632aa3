"""Which experts should stay in memory? Cache policies on recorded traces and on routing fitted to seven models.

    python benchmarks/cache_policies.py [TRACE.npy ...] [--tokens N]

Hit rates are of all uses, first reads included. Below the policies: the product's with one of its constants changed,
what loading the hottest experts beforehand saves, and what choosing a victim costs. No model is needed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pocketmoe.bundle.store import ExpertId
from pocketmoe.profiles.routing.policies import PINNED, POLICIES, PRODUCT, Routing, drive, routing_of
from pocketmoe.profiles.routing.synthetic import fitted_models, synthetic_routing
from pocketmoe.runtime.paging.cache import ExpertCache, Scoring
from pocketmoe.runtime.paging.expert_counts import shares, to_load_first
from pocketmoe.runtime.trace import read_trace

BUDGETS = (0.0625, 0.125, 0.25, 0.5, 0.75)
VARIANTS = {
    "as it is": Scoring(),
    **{f"half_life {h}": Scoring(half_life=h) for h in (8, 16, 32, 64)},
    **{f"recency_bonus {a}": Scoring(recency_bonus=a) for a in (0.0, 0.1, 0.5)},
    **{f"distance_weight {w}": Scoring(distance_weight=w) for w in (0.0, 0.3)},
}
_TRACES = Path(__file__).with_name("traces")
_MOST_LAYERS = 16  # of a fitted model, to have the table in minutes
_NEW_TEXTS = ", four texts"
_HEAD = ["", *(f"{share:.2%}" for share in BUDGETS)]

Rates = dict[str, np.ndarray]  # hit rates [budgets] by policy


def slots_of(routing: Routing) -> list[int]:
    return [int(share * sum(routing.experts.values())) for share in BUDGETS]


def policy_rates(routing: Routing) -> Rates:
    wanted = sum(len(visit.wanted) for visit in routing.visits)
    names = [name for name in POLICIES if name != PINNED]
    return {name: POLICIES[name](routing, slots_of(routing)).sum(axis=1) / wanted for name in names}


def variant_rates(routing: Routing) -> Rates:
    wanted = sum(len(visit.wanted) for visit in routing.visits)
    rates = {}
    for name, scoring in VARIANTS.items():
        caches = (ExpertCache(n, routing.experts, routing.width, scoring) for n in slots_of(routing))
        rates[name] = np.array([drive(cache, routing).sum() / wanted for cache in caches])
    return rates


def fitted(tokens: int) -> Iterator[tuple[str, np.ndarray, int]]:
    """Name, ids and experts per layer of each fitted model: one text, and four texts that follow each other."""
    for name, whole in fitted_models().items():
        model = replace(whole, layers=min(whole.layers, _MOST_LAYERS))
        yield name, synthetic_routing(model, [tokens], seed=1), model.experts
        yield f"{name}{_NEW_TEXTS}", synthetic_routing(model, [tokens // 4] * 4, seed=2), model.experts


def preload(name: str, before: np.ndarray, after: np.ndarray, experts: int) -> Iterator[list[str]]:
    """What is saved in 64 tokens by loading what another text used most, before its first token."""
    layers, top_k = after.shape[1:]
    uses = np.stack([np.bincount(before[:, layer].ravel(), minlength=experts) for layer in range(layers)])
    share, routing = shares(uses, [top_k] * layers), routing_of(after[:64], [experts] * layers)
    pool = [ExpertId(layer, e) for layer in range(layers) for e in range(experts)]
    for budget in BUDGETS[1:4]:
        n = int(budget * len(pool))
        rows = []
        for filled in (0, n, 2 * n):  # `to_load_first` fills half
            cache = ExpertCache(n, routing.experts, experts)
            for layer in range(layers) if filled else ():
                cache.expect(layer, share[layer])
            for expert in to_load_first(share, pool, filled):
                cache.place(expert, ())
            rows.append(drive(cache, routing))
        cold, half, whole = rows
        rates = [f"{hits[:8].sum() / after[:8].size:.3f}" for hits in rows]
        saved = [(hits - cold).sum() / count for hits, count in ((half, n // 2), (whole, n))]
        second = (whole - half).sum() / (n - n // 2)
        yield [name, f"{budget:.2%}", *rates, f"{saved[0]:.0%}", f"{second:.0%}"]


def victim_cost_us(experts: int) -> float:
    """Microseconds for `place` in a full cache of a quarter of 16 layers' experts."""
    ids = np.argsort(np.random.default_rng(0).random((40, 16, experts)), axis=2)[:, :, :8]
    cache = ExpertCache(4 * experts, dict.fromkeys(range(16), experts))
    spent, count = 0.0, 0
    for token in ids:
        for layer, chosen in enumerate(token):
            cache.count(layer, chosen[None])
            keep = {ExpertId(layer, int(e)) for e in chosen}
            missing = [expert for expert in keep if cache.slot_of(expert) is None]
            began = time.perf_counter()
            for expert in missing:
                cache.place(expert, keep)
            spent, count = spent + time.perf_counter() - began, count + len(missing)
    return spent / count * 1e6


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def rate_table(title: str, rates: Rates) -> None:
    print(f"{title}:\n")
    table(_HEAD, [[name, *(f"{rate:.3f}" for rate in found)] for name, found in rates.items()])


def mean(found: Sequence[Rates]) -> Rates:
    return {name: np.mean([rates[name] for rates in found], axis=0) for name in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="*", type=Path, default=sorted(_TRACES.glob("*.npy")))
    parser.add_argument("--tokens", type=int, default=256, help="of each fitted model")
    options = parser.parse_args()
    variants, loaded = [], []
    for path in options.traces:
        trace = read_trace(path)
        routing = routing_of(trace.ids, trace.experts, trace.prompt_walks)
        rate_table(path.stem, policy_rates(routing))
        variants.append(variant_rates(routing))
        half = len(trace.ids) // 2
        loaded += preload(f"{path.stem}, second half", trace.ids[:half], trace.ids[half:], max(trace.experts))
    if variants:
        rate_table("the product's policy with one constant changed, mean of these traces", mean(variants))
    policies, variants, quarter = [], [], []
    for name, ids, experts in fitted(options.tokens):
        routing = routing_of(ids, [experts] * ids.shape[1])
        policies.append(rates := policy_rates(routing))
        if name.endswith(_NEW_TEXTS):
            variants.append(variant_rates(routing))
        columns = ("belady", PRODUCT, "decayed-24", "next-use", "lru-by-layer", "lru")
        quarter.append([name, *(f"{rates[column][2]:.3f}" for column in columns)])
    print("fitted models at 25%:\n")
    table(["", *columns], quarter)
    rate_table("mean over the fitted models", mean(policies))
    rate_table("the product's policy with one constant changed, mean over the four texts", mean(variants))
    for name in ("olmoe", "qwen3-30b", "deepseek-v2-lite"):
        model = fitted_models()[name]
        ids = synthetic_routing(model, [200] * 4 + [64], seed=5)
        loaded += preload(f"{name}, fitted, new text", ids[:800], ids[800:], model.experts)
    print("hits of the first 8 tokens by what is loaded beforehand, and what part of these reads 64 tokens save:\n")
    table(["", "budget", "nothing", "half", "all", "of the first half", "of the second"], loaded)
    costs = [f"{victim_cost_us(experts):.1f} us with {experts} experts per layer" for experts in (64, 256)]
    print(f"choosing a victim: {', '.join(costs)}")


if __name__ == "__main__":
    main()
