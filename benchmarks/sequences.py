"""Texts that decode together: tokens/s in sum and the time of a token of each, for 1, 2, 4 and 8 of them.

    python benchmarks/sequences.py BUNDLE [--steps 24] [--rounds 3] [--json ROWS]

The bundle is that of a checkpoint of make_checkpoint.py to which routing.py gave the routing of a real model; each text
follows the trace from a place of its own. For 100, 50 and 25% of the experts one engine is opened with eight texts,
each with a prompt; then one, two, four and eight of them get tokens together, in turns, so that what else the machine
does meets all alike. Each engine and turn begins with steps that are not counted. Figures are of all turns together;
the ratio is to one text alone at the same share.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

from machine import THREADS, append_row, command_line
from routing import FIRST, TOKENS

from pocketmoe.bundle.reader import Bundle
from pocketmoe.runtime.engine.engine import Engine, Feed
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions

COUNTS = (1, 2, 4, 8)
SHARES = (1.0, 0.5, 0.25)
PROMPT = 32
WARM_UP = 4  # steps of a turn that are not counted
HEAD = (
    "experts in memory", "texts", "tokens/s in sum", "of one text", "ms per token of each", "hits", "MB read per token",
    "waiting for the disk", "budget MB",
)  # fmt: skip


class Turns:
    """What the turns of so many texts have come to."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.steps_s: list[float] = []
        self.hits = self.wanted = self.bytes_read = 0
        self.wait_s = 0.0

    def take(self, engine: Engine, texts: list[list[int]], steps: int) -> None:
        """So many steps more, each with the next token of each text; `texts` lose what is fed."""
        for step in range(WARM_UP + steps):
            stats = engine.stats
            before = (stats.hits + stats.prefetch_hits, stats.misses, stats.bytes_read, stats.wait_s)
            began = time.perf_counter()
            engine.step(
                [
                    Feed(sequence, [text.pop(0)], decoding=True)
                    for sequence, text in zip(engine.sequences[: self.count], texts, strict=False)
                ]
            )
            if step < WARM_UP:
                continue
            self.steps_s.append(time.perf_counter() - began)
            self.hits += stats.hits + stats.prefetch_hits - before[0]
            self.wanted += stats.hits + stats.prefetch_hits + stats.misses - before[0] - before[1]
            self.bytes_read += stats.bytes_read - before[2]
            self.wait_s += stats.wait_s - before[3]

    def figures(self, share: float, budget_bytes: int) -> dict:
        total_s, tokens = sum(self.steps_s), self.count * len(self.steps_s)
        return {
            "experts_share": share,
            "texts": self.count,
            "tokens_per_s": tokens / total_s,
            "median_step_s": statistics.median(self.steps_s),
            "hit_rate": self.hits / self.wanted,
            "bytes_read_per_token": self.bytes_read / tokens,
            "waiting_share": self.wait_s / total_s,
            "budget_bytes": budget_bytes,
            "steps": len(self.steps_s),
            "threads": THREADS,
            "load": os.getloadavg()[0],
        }


def measure(bundle: Bundle, share: float, steps: int, rounds: int) -> list[dict]:
    """A row for each number of texts, at one share of the experts."""
    most = max(COUNTS)
    each = PROMPT + rounds * (steps + WARM_UP) * len(COUNTS)
    places = [FIRST + index * (TOKENS - each) // (most - 1) for index in range(most)]
    texts = [list(range(place, place + each)) for place in places]
    options = EngineOptions(MemoryRequest(expert_share=share), each, THREADS, sequences=most)
    turns = [Turns(count) for count in COUNTS]
    with Engine(bundle, options) as engine:
        for sequence, text in zip(engine.sequences, texts, strict=True):
            engine.step([Feed(sequence, [text.pop(0) for _ in range(PROMPT)])])
        for _ in range(rounds):
            for turn in turns:
                turn.take(engine, texts, steps)
        return [turn.figures(share, engine.budget.total_bytes) for turn in turns]


def line(row: dict, alone: dict) -> str:
    """A line of the table."""
    cells = [f"{row['experts_share']:.0%}", f"{row['texts']}", f"{row['tokens_per_s']:.1f}"]
    cells += [f"{row['tokens_per_s'] / alone['tokens_per_s']:.2f}", f"{row['median_step_s'] * 1e3:.0f}"]
    cells += [f"{row['hit_rate']:.0%}", f"{row['bytes_read_per_token'] / 1e6:.1f}", f"{row['waiting_share']:.0%}"]
    cells += [f"{row['budget_bytes'] / 1e6:.0f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--steps", type=int, default=24, help="of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="ROWS", help="add the rows to this file")
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    print(f"| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|")
    for share in SHARES:
        rows = measure(bundle, share, args.steps, args.rounds)
        for row in rows:
            print(line(row, rows[0]), flush=True)
            if args.json:
                append_row(args.json, row)
    print(f"\n`{command_line()}` (load {os.getloadavg()[1]:.0f} on {os.cpu_count()} cores)")


if __name__ == "__main__":
    main()
