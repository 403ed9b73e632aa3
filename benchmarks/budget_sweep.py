"""Is a larger budget ever slower than a smaller one? Decode, first token and next prompt, from the least to everything.

    python benchmarks/budget_sweep.py BUNDLE --most 22GB --json ROWS [--count 16] [--routing realistic]     needs root

Each budget is a fresh process (ours.py) with cold caches in a memory cgroup of just that size. Each is the same
multiple of the one before; they are measured on the way up and down, so that a machine that slows down makes no slope.
Wherever a larger one is slower than a smaller one by more than `--noise`, the two are measured again, as often as
`--again` says, and medians count. Exits 1 where one is slower even so.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from machine import Outcome, append_row, command_line, read_rows, run_cold

from pocketmoe.sizes import parse_size

SPEEDS: dict[str, Callable[[dict], float]] = {  # what must not fall, by name
    "tokens/s": lambda figures: figures["tokens_per_s"],
    "first tokens/s": lambda figures: 1 / (figures["start_s"] + figures["ttft_s"]),
    "next prompt tokens/s": lambda figures: figures["next_prefill_tokens_per_s"],
}


@dataclass(frozen=True)
class Slower:
    """A larger budget that is slower than a smaller one."""

    what: str
    smaller_bytes: int
    larger_bytes: int
    share: float  # of the smaller one's speed


def budgets(least: int, most: int, count: int) -> list[int]:
    """So many sizes from the least to the most, each the same multiple of the one before, in whole MB."""
    return [int(size / 1e6) * 10**6 for size in np.geomspace(least + 10**6, most, count)]


def up_and_down(sizes: Sequence[int]) -> list[int]:
    """Every other size on the way up, the rest on the way down."""
    return [*sizes[::2], *sizes[1::2][::-1]]


def median(rows: Sequence[dict], budget: int, speed: Callable[[dict], float]) -> float:
    """Over the runs of a budget that lived."""
    return statistics.median(speed(row["figures"]) for row in rows if row["budget_bytes"] == budget and row["figures"])


def find_slower(rows: Sequence[dict], noise: float) -> list[Slower]:
    """For each budget the fastest smaller one that beats it by more than `noise`, in each of the speeds."""
    sizes = sorted({row["budget_bytes"] for row in rows if row["figures"]})
    found: list[Slower] = []
    for what, speed in SPEEDS.items():
        best = sizes[0] if sizes else 0
        for size in sizes:
            share = median(rows, size, speed) / median(rows, best, speed)
            if share < 1 - noise:
                found.append(Slower(what, best, size, share))
            elif share > 1:
                best = size
    return found


def least_bytes(arguments: Sequence[str]) -> int:
    """What is named as the least where next to nothing is given."""
    refused = run_cold("ours.py", [*arguments, "--memory", "1000000"], None).reason
    found = re.search(r"least that would do is (\d+) MB", refused)
    if not found:
        raise SystemExit(f"a budget of 1 MB was not refused: {refused}")
    return int(found[1]) * 10**6


def measure(args: argparse.Namespace, arguments: Sequence[str], budget: int) -> dict:
    """One cold run, kept as a row."""
    outcome: Outcome = run_cold("ours.py", [*arguments, "--memory", str(budget)], budget)
    row = {"bundle": args.bundle.name, "routing": args.routing, "prompt": args.prompt, "tokens": args.tokens}
    row |= {"budget_bytes": budget, "figures": outcome.figures, "reason": outcome.reason, "peak": outcome.peak_bytes}
    append_row(args.json, row)
    return row


def render(rows: Sequence[dict]) -> str:
    """A line for each budget: medians where it was measured more than once."""
    lines = [
        "| budget MB | tokens/s | hits | computing ms | waiting ms | start + first token s | next prompt tokens/s "
        "| slots | made | peak MB | runs |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for budget in sorted({row["budget_bytes"] for row in rows}):
        mine = [row for row in rows if row["budget_bytes"] == budget]
        lived = [row["figures"] for row in mine if row["figures"]]
        if not lived:
            lines.append(f"| {budget / 1e6:.0f} | {mine[-1]['reason']} |")
            continue
        last, decode = lived[-1], median(rows, budget, SPEEDS["tokens/s"])
        first, following = (median(rows, budget, SPEEDS[what]) for what in ("first tokens/s", "next prompt tokens/s"))
        lines.append(
            f"| {budget / 1e6:.0f} | {decode:.2f} | {last['hit_rate']:.1%} "
            f"| {statistics.median(f['compute_s_per_token'] for f in lived) * 1e3:.1f} "
            f"| {statistics.median(f['wait_s_per_token'] for f in lived) * 1e3:.1f} "
            f"| {1 / first:.1f} | {following:.1f} "
            f"| {last['slots']} of {last['experts']} | {last['slots_made']} "
            f"| {max(row['peak'] for row in mine) / 1e6:.0f} | {len(lived)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--json", type=Path, required=True, help="rows are appended here, and not measured twice")
    parser.add_argument("--most", type=parse_size, required=True, help="the largest budget")
    parser.add_argument("--least", type=parse_size, help="the smallest; default: the least that would do")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--again", type=int, default=2, help="more runs of two budgets of which the larger is slower")
    parser.add_argument("--minutes", type=float, default=1e9, help="no run is begun later than that")
    parser.add_argument("--noise", type=float, default=0.05, help="what counts as slower, as a share")
    parser.add_argument("--routing", choices=("uniform", "realistic"), default="realistic")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    arguments = [str(args.bundle), "--prompt", str(args.prompt), "--tokens", str(args.tokens)]
    arguments += ["--routing", args.routing]
    end = time.monotonic() + 60 * args.minutes
    wanted = budgets(args.least or least_bytes(arguments), args.most, args.count)
    rows = [row for row in read_rows(args.json) if row["budget_bytes"] in wanted]
    for budget in up_and_down(wanted):
        if time.monotonic() < end and budget not in {row["budget_bytes"] for row in rows}:
            rows.append(measure(args, arguments, budget))
    for _ in range(args.again):
        slower = find_slower(rows, args.noise)
        doubtful = sorted({size for found in slower for size in (found.smaller_bytes, found.larger_bytes)})
        rows += [measure(args, arguments, budget) for budget in doubtful if time.monotonic() < end]
    print(render(rows))
    slower = find_slower(rows, args.noise)
    for found in slower:
        print(f"{found.larger_bytes / 1e6:.0f} MB is slower than {found.smaller_bytes / 1e6:.0f} MB: ", end="")
        print(f"{found.what} {found.share:.2f}")
    print(f"\n`{command_line()}`")
    sys.exit(bool(slower))


if __name__ == "__main__":
    main()
