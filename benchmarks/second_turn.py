"""How long is it to the first token of a conversation's second turn: anew, from memory, from disk after a restart?

    python benchmarks/second_turn.py BUNDLE [--tokens 4000] [--memory 100%] [--repeats 3] [--json FILE]

The first turn is a prompt of so many tokens, drawn by a fixed seed, and an answer of 16; the second one is all of it
and 64 tokens more. Each row is a fresh process, whose experts are loaded and warm by a short text of other tokens: one
computes the second turn anew, one after the first turn, one with the prefix cache that the first turn has left on disk,
its files dropped from the page cache. All three must give the same tokens; else it exits 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import pocketmoe

ANSWER, MORE = 16, 64
SPECIAL = 16  # ids that may be special tokens
HEAD = ("second turn", "first token s", "of anew", "tokens reused", "on disk MB", "peak MB of budget")
WORDS = {"anew": "computed anew", "memory": "from memory", "disk": "from disk, after a restart"}


def texts(vocabulary: int, tokens: int) -> tuple[list[int], list[int], list[int]]:
    """A short text to warm up with, the first prompt, and what the second turn adds."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(SPECIAL, vocabulary - SPECIAL, 200 + tokens + MORE).tolist()
    return drawn[:200], drawn[200 : 200 + tokens], drawn[200 + tokens :]


def drop(folder: Path) -> None:
    """Have the next process read these files from the disk."""
    os.sync()
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def worker(bundle: Path, way: str, tokens: int, memory: str, folder: Path, answer: list[int]) -> dict:
    """The second turn in this process; `way` first: the first turn, which leaves the prefix cache and its answer."""
    kept = {"prefix_cache": folder, "prefix_cache_size": "64GB"} if way in ("first", "disk") else {}
    limit = tokens + ANSWER + MORE + ANSWER
    with pocketmoe.load(bundle, memory=memory, context=limit, **kept) as model:
        warm, first, more = texts(model.bundle.manifest.model.vocab_size, tokens)
        options = {"max_tokens": ANSWER, "min_tokens": ANSWER}
        model.generate(warm, **options)
        if way in ("first", "memory"):
            answer = list(model.generate(first, **options).tokens)
        if way == "first":
            return {"answer": answer}
        result = model.generate([*first, *answer, *more], **options)
    return {
        "ttft_s": result.ttft_s,
        "reused": result.reused_tokens,
        "tokens": list(result.tokens),
        "peak": result.peak_memory_bytes,
        "budget": result.memory_budget_bytes,
    }


def run(args: argparse.Namespace, way: str, folder: Path, answer: list[int]) -> dict:
    """The same in a fresh process."""
    command = [sys.executable, __file__, str(args.bundle), "--tokens", str(args.tokens), "--memory", args.memory]
    command += ["--worker", way, "--folder", str(folder), "--answer", json.dumps(answer)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def cpu() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--memory", default="100%")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.bundle, args.worker, args.tokens, args.memory, args.folder, args.answer)))
        return
    rows: dict[str, list[dict]] = {way: [] for way in WORDS}
    with tempfile.TemporaryDirectory(dir=args.bundle.parent) as scratch:
        folder = Path(scratch) / "cache"
        answer = run(args, "first", folder, [])["answer"]
        on_disk = sum(path.stat().st_size for path in folder.iterdir())
        for _ in range(args.repeats):
            for way, found in rows.items():
                drop(folder)
                found.append(run(args, way, folder, answer))
    anew = sorted(row["ttft_s"] for row in rows["anew"])[args.repeats // 2]
    print(f"{cpu()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {args.bundle.name}, {args.tokens} tokens,")
    print(f"--memory {args.memory}; the middle of {args.repeats} runs, and their range\n")
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for way, found in rows.items():
        times = sorted(row["ttft_s"] for row in found)
        middle, last = times[args.repeats // 2], found[-1]
        seconds = f"{middle:.2f} ({times[0]:.2f} to {times[-1]:.2f})"
        memory = f"{last['peak'] / 1e6:.0f} of {last['budget'] / 1e6:.0f}"
        cells = [WORDS[way], seconds, f"{middle / anew:.1%}", str(last["reused"])]
        print(f"| {' | '.join([*cells, f'{on_disk / 1e6:.0f}' if way == 'disk' else '-', memory])} |")
    print(f"\n`python benchmarks/second_turn.py {args.bundle.name} --tokens {args.tokens} --memory {args.memory}`")
    if args.json:
        args.json.write_text(json.dumps({"cpu": cpu(), "load": os.getloadavg(), "on_disk_bytes": on_disk, **rows}))
    if len({tuple(row["tokens"]) for found in rows.values() for row in found}) != 1:
        sys.exit("the three ways do not give the same tokens")


if __name__ == "__main__":
    main()
