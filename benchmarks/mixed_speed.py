"""Bundles of one model side by side at equal memory for experts, reads slowed down: tokens/s, hits, reads, same tokens.

    python benchmarks/mixed_speed.py BUNDLE ... --texts TEXTS [--share 0.25 0.35 0.5 1] [--read-mb 5]

A share is one of the first bundle's experts, in bytes. Each step is taken by all bundles in turn, so that whatever else
the machine does meets them alike; reads are slowed so that the disk decides, as it does with large models.
Exits 1 where a bundle's own greedy answer is not the same with every share.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pocketmoe.bundle.reader import Bundle
from pocketmoe.profiles.quality.quality import read_slices
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.tokenizer import Text

PROMPT, TOKENS, ANSWER = 64, 96, 48


@dataclass
class Candidate:
    """A bundle, and what it answered greedily so far."""

    bundle: Bundle
    record_bytes: float  # of an expert, on average
    answers: set[tuple[int, ...]] = field(default_factory=set)

    @classmethod
    def open(cls, path: Path) -> Candidate:
        bundle = Bundle.open(path)
        with bundle.open_store() as store:
            return cls(bundle, float(np.mean([record.nbytes for record in store.records.values()])))


def step(engine: Engine, token: int) -> tuple[float, int, int, int]:
    """Seconds, hits, misses and bytes read of one token."""
    before = (engine.stats.hits, engine.stats.misses, engine.stats.bytes_read)
    began = time.perf_counter()
    engine.feed([token])
    seconds = time.perf_counter() - began
    after = (engine.stats.hits, engine.stats.misses, engine.stats.bytes_read)
    hits, misses, nbytes = (now - then for now, then in zip(after, before, strict=True))
    return seconds, hits, misses, nbytes


def answer(engine: Engine, prompt: Sequence[int]) -> tuple[int, ...]:
    """What it goes on with greedily."""
    engine.reset()
    logits, said = engine.feed(prompt), list[int]()
    for _ in range(ANSWER):
        said.append(int(logits[-1].argmax()))
        logits = engine.feed([said[-1]])
    return tuple(said)


def rows(candidates: Sequence[Candidate], texts: Sequence[Sequence[int]], share: float, rate: float) -> Iterator[str]:
    slowed = rate if share < 1 else None
    with contextlib.ExitStack() as stack:
        engines: list[Engine] = []
        for one in candidates:
            memory = MemoryRequest(expert_share=min(1.0, share * candidates[0].record_bytes / one.record_bytes))
            options = EngineOptions(memory, PROMPT + TOKENS, prefetch="off", read_bytes_per_s=slowed)
            engines.append(stack.enter_context(Engine(one.bundle, options)))
        steps: list[list[tuple[float, int, int, int]]] = [[] for _ in engines]
        for text in texts:
            for engine in engines:
                engine.reset()
                engine.feed(text[:PROMPT])
            for token in text[PROMPT : PROMPT + TOKENS]:
                for taken, engine in zip(steps, engines, strict=True):
                    taken.append(step(engine, token))
        base = 0.0
        for one, taken, engine in zip(candidates, steps, engines, strict=True):
            one.answers.add(answer(engine, texts[0][:PROMPT]))
            seconds, hits, misses, nbytes = (statistics.mean(column) for column in zip(*taken, strict=True))
            base = base or 1 / seconds
            yield (
                f"| {share:.0%} | {one.bundle.root.name} | {sum(engine.opened.slots.values())} "
                f"| {hits / (hits + misses):.1%} | {nbytes / 1e3:.0f} | {1 / seconds:.1f} | {1 / seconds / base:.2f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--share", type=float, nargs="+", default=[0.25, 0.35, 0.5, 1.0])
    parser.add_argument("--read-mb", type=float, default=5, help="MB per second that are read at most")
    args = parser.parse_args()
    candidates = [Candidate.open(path) for path in args.bundles]
    tokenizer = Text(candidates[0].bundle)
    texts = [tokenizer.encode(piece.text)[: PROMPT + TOKENS] for piece in read_slices(args.texts)[:3]]
    print("| memory | bundle | slots | hits | kB read a token | tokens/s | over the first |")
    print("|---|---|---|---|---|---|---|")
    for share in args.share:
        for row in rows(candidates, texts, share, args.read_mb * 1e6):
            print(row, flush=True)
    other = [one.bundle.root.name for one in candidates if len(one.answers) > 1]
    print(f"other answers with another share: {', '.join(other) or 'none'}")
    sys.exit(bool(other))


if __name__ == "__main__":
    main()
