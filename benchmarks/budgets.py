"""Random budgets, each kept under a memory cgroup of exactly that size, where going over is death.

    python benchmarks/budgets.py BUNDLE [--count 20] [--seed 0] [--json ROWS]        needs root

Between the least that `pocketmoe run` says would do and room for every expert: `run --memory N` in a fresh process with
cold caches, in a cgroup of N bytes. None may be killed or refused, none may count more than its budget, and each must
give the tokens that a run without a limit gives. Exits 1 when one does not.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from machine import append_row, command_line, drop_caches

from pocketmoe.profiles.machine.limit import run_limited

PROMPT = "The function returns a list of"
TOKENS = 40


@dataclass(frozen=True)
class Row:
    """One run; `peak_bytes` is the cgroup's, page cache included, `counted_peak_bytes` what the run says of itself."""

    budget_bytes: int
    peak_bytes: int
    counted_peak_bytes: int
    hit_rate: float
    tokens_per_s: float
    problem: str


def command(bundle: Path, memory: str) -> list[str]:
    options = ["--prompt", PROMPT, "--max-tokens", str(TOKENS), "--memory", memory, "--json"]
    return [sys.executable, "-m", "pocketmoe.cli", "run", str(bundle), *options]


def unlimited(bundle: Path) -> dict:
    """The report of a run with room for every expert, which also packs them."""
    done = subprocess.run(command(bundle, "100%"), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def least_bytes(bundle: Path) -> int:
    """What `run` names when it is given next to nothing."""
    refused = subprocess.run(command(bundle, "1MB"), capture_output=True, text=True, check=False)
    found = re.search(r"least that would do is (\d+) MB", refused.stderr)
    if refused.returncode != 4 or not found:
        raise SystemExit(f"a budget of 1 MB was not refused: exit {refused.returncode} {refused.stderr}")
    return int(found[1]) * 10**6


def run_within(bundle: Path, budget_bytes: int, wanted: list[int]) -> Row:
    """One cold run in a cgroup of the budget's size."""
    drop_caches()
    done = run_limited(command(bundle, str(budget_bytes)), budget_bytes)
    if done.returncode:
        said = "killed" if done.returncode < 0 else f"exit {done.returncode}: {done.stderr.strip()[-200:]}"
        return Row(budget_bytes, done.peak_bytes, 0, 0.0, 0.0, said)
    report = json.loads(done.stdout)
    problem = ""
    if report["tokens"] != wanted:
        problem = "other tokens"
    elif report["peak_memory_bytes"] > budget_bytes:
        problem = "counted more than its budget"
    counted, hits, speed = report["peak_memory_bytes"], report["expert_hit_rate"], report["decode_tokens_per_s"]
    return Row(budget_bytes, done.peak_bytes, counted, hits, speed, problem)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="rows are appended here")
    args = parser.parse_args()
    full = unlimited(args.bundle)
    least, most = least_bytes(args.bundle), full["memory_budget_bytes"]
    dice = random.Random(args.seed)
    budgets = sorted(dice.randint(least, most) for _ in range(args.count))
    print(
        f"{args.count} budgets between {least / 1e6:.0f} MB, the least, and {most / 1e6:.0f} MB, room for all experts\n"
    )
    print("| budget = cgroup MB | counted peak MB | hits | tokens/s | |\n|---|---|---|---|---|")
    failed = False
    for budget in budgets:
        row = run_within(args.bundle, budget, full["tokens"])
        failed |= bool(row.problem)
        cells = f"{row.budget_bytes / 1e6:.1f} | {row.counted_peak_bytes / 1e6:.1f} | {row.hit_rate:.0%}"
        print(f"| {cells} | {row.tokens_per_s:.1f} | {row.problem or 'same tokens'} |", flush=True)
        if args.json:
            append_row(args.json, asdict(row))
    print(f"\n`{command_line()}`")
    sys.exit(failed)


if __name__ == "__main__":
    main()
