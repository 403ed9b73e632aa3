"""Feeds given tokens to our engine in this process and prints the figures as one line of JSON; started by benchmarks.

    python benchmarks/ours.py BUNDLE [--memory BYTES | --share S] [--prompt N] [--tokens N] [--routing realistic] ...

Predictions of the next layer are made worse: a random model's state hardly changes from one layer to the next, so that
they would be right almost always, which no trained model's are.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from machine import THREADS
from routing import given_tokens, repetition

from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import PocketMoEError
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.kv_cache import state_bytes
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.system.memory import major_faults

RECALL = 0.8  # of Qwen3.6-35B, measured by others; Qwen3-30B has .89, GLM-5.2 .72 to .77


def dilute(engine: Engine, recall: float, experts: int) -> None:
    """Have so many of all predicted experts be right: nearly all first ones, fewer of each rank that follows.

    On the reference model .96, .89, .80 and .58 of the four ranks are. What takes the place of an expert is another,
    as often as that is chosen: a router's near misses are popular ones.
    """
    prefetcher = engine._prefetcher
    predict, rng = prefetcher.predict, np.random.default_rng(0)

    def predict_worse(layer: int, x: np.ndarray) -> list:
        found = predict(layer, x)
        if not found:
            return found
        ranked = prefetcher._predicted[1]  # type: ignore[index]
        for rank in range(len(ranked)):
            if rng.random() < 2 * (1 - recall) * (rank + 0.5) / len(ranked):
                chances = engine.stats.expert_counts[layer + 1, :experts] + 1
                chances[ranked] = 0
                upto = chances.cumsum()
                ranked[rank] = int(np.searchsorted(upto, rng.random() * upto[-1], side="right"))
        return [type(found[0])(layer + 1, expert) for expert in ranked[: len(found)]]

    prefetcher.predict = predict_worse  # type: ignore[method-assign]


def touched_bytes(bundle: Bundle, tokens: int) -> int:
    """What one token must read of weights and, with so many tokens before it, of states: nothing twice."""
    manifest = bundle.manifest
    tied = not any(tensor.role == "head" for tensor in manifest.dense)
    dense = sum(tensor.nbytes for tensor in manifest.dense if tied or tensor.role != "embedding")
    with bundle.open_store() as store:
        records = list(store.records.values())
    experts = 0.0
    for number, layer in enumerate(manifest.moe_layers):
        sizes = [record.nbytes for record in records if record.layer == number]
        experts += layer.top_k * sum(sizes) / len(sizes)
    return dense + int(experts) + state_bytes(manifest.states, tokens)


class Meter:
    """What the engine has counted between its making and a call."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._before = self._read()

    def _read(self) -> dict[str, float]:
        stats, times = self._engine.stats, self._engine.times
        names = ("hits", "prefetch_hits", "misses", "prefetches", "bytes_read", "bytes_prefetched", "run_s", "wait_s")
        counted = {name: getattr(stats, name) for name in names}
        counted |= {"segments_s": times.segments_s, "faults": major_faults(), "cpu_s": time.process_time()}
        return counted | {"total_s": time.perf_counter()}

    def read(self) -> dict[str, float]:
        now = self._read()
        return {name: now[name] - before for name, before in self._before.items()}


def measure(bundle: Bundle, memory: MemoryRequest, args: argparse.Namespace) -> dict:
    """Open, feed a prompt, forget it, feed another prompt, feed the other tokens one at a time."""
    n_first = args.first or args.prompt
    tokens = given_tokens(args.routing, n_first + args.prompt + args.tokens)
    began = time.perf_counter()
    options = EngineOptions(memory, max(n_first, args.prompt + args.tokens), THREADS, prefetch=args.prefetch)
    with Engine(bundle, options) as engine:
        start_s = time.perf_counter() - began
        dilute(engine, args.recall, bundle.manifest.moe_layers[0].n_experts)
        prompt = Meter(engine)
        engine.feed(tokens[:n_first])
        fed = prompt.read()
        engine.reset()
        prompt = Meter(engine)
        engine.feed(tokens[n_first : n_first + args.prompt])
        fed_next = prompt.read()
        chosen: list[list[np.ndarray]] = [[] for _ in bundle.manifest.moe_layers]
        engine.on_routes = lambda layer, expert_ids: chosen[layer].append(expert_ids[0].copy())
        decode = Meter(engine)
        for token in tokens[n_first + args.prompt :]:
            engine.feed([token])
        spent = decode.read()
        wanted = spent["hits"] + spent["prefetch_hits"] + spent["misses"]
        needed, read = wanted - spent["hits"], spent["misses"] + spent["prefetches"]
        busy = spent["segments_s"] + spent["run_s"] + spent["wait_s"]
        return {
            "tokens": args.tokens,
            "tokens_per_s": args.tokens / spent["total_s"],
            "prompt": args.prompt,
            "prefill_tokens_per_s": n_first / fed["total_s"],
            "prefill_read_bytes": fed["bytes_read"],
            "next_prefill_tokens_per_s": args.prompt / fed_next["total_s"],
            "ttft_s": fed["total_s"],
            "start_s": start_s,
            "hit_rate": spent["hits"] / wanted,
            "prefetch_hit_rate": spent["prefetch_hits"] / wanted,
            "prefetches_read_per_token": spent["prefetches"] / args.tokens,
            "prefetch_precision_by_rank": engine.predictions.precision_by_rank,
            "read_bytes_per_token": spent["bytes_read"] / args.tokens,
            "needed_bytes_per_token": needed * spent["bytes_read"] / read / args.tokens if read else 0.0,
            "touched_bytes_per_token": touched_bytes(bundle, args.prompt + args.tokens // 2),
            "major_faults_per_token": spent["faults"] / args.tokens,
            "compute_s_per_token": (spent["segments_s"] + spent["run_s"]) / args.tokens,
            "experts_s_per_token": spent["run_s"] / args.tokens,
            "wait_s_per_token": spent["wait_s"] / args.tokens,
            "cpu_s_per_token": spent["cpu_s"] / args.tokens,
            "python_share": 1 - busy / spent["total_s"],  # and predicting, which the reads of a layer hide
            "slots": sum(engine.opened.slots.values()),
            "slots_made": sum(pool.n_made for pool in engine._pager._pools.values()),
            "experts": sum(engine.opened.experts.values()),
            "backend": engine.opened.backend,
            "budget_bytes": engine.budget.total_bytes,
            "counted_peak_bytes": engine.budget.peak_bytes,
            "repetition": repetition(np.array(chosen).swapaxes(0, 1)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--memory", type=int, help="of the whole process, in bytes")
    parser.add_argument(
        "--share", type=float, default=1.0, help="of the experts that have room, where no memory is given"
    )
    parser.add_argument("--first", type=int, help="tokens of the first prompt; as many as of the next where not given")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--routing", choices=("uniform", "realistic"), default="uniform")
    parser.add_argument("--recall", type=float, default=RECALL)
    parser.add_argument("--prefetch", choices=("auto", "on", "off"), default="auto")
    args = parser.parse_args()
    memory = MemoryRequest(total_bytes=args.memory) if args.memory else MemoryRequest(expert_share=args.share)
    try:
        print(json.dumps(measure(Bundle.open(args.bundle), memory, args)), flush=True)
    except PocketMoEError as error:
        raise SystemExit(f"{error}. {error.remedy}") from error


if __name__ == "__main__":
    main()
