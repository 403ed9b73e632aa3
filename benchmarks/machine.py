"""What every benchmark needs of the machine: cold caches, fresh processes under a limit, the disk's speed."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pocketmoe.profiles.machine.limit import run_limited

THREADS = 2


@dataclass(frozen=True)
class Outcome:
    """What a worker printed, or why it printed nothing; `peak_bytes` as its cgroup counted, page cache included."""

    figures: dict | None
    reason: str
    peak_bytes: int


def drop_caches() -> None:
    """Let the next process read everything from the disk. Needs root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def run_cold(script: str, arguments: Sequence[str], limit_bytes: int | None, timeout_s: float = 400) -> Outcome:
    """Run one of this directory's scripts from a cold start under a memory limit; its last line is JSON."""
    drop_caches()
    began = time.perf_counter()
    outcome = _run(script, arguments, limit_bytes, timeout_s)
    said = outcome.reason or f"{outcome.peak_bytes / 1e6:.0f} MB at most"
    print(f"  {script} {' '.join(arguments[1:])}: {time.perf_counter() - began:.0f} s, {said}", file=sys.stderr)
    return outcome


def _run(script: str, arguments: Sequence[str], limit_bytes: int | None, timeout_s: float) -> Outcome:
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    try:
        done = run_limited(command, limit_bytes, timeout_s)
    except subprocess.TimeoutExpired:
        return Outcome(None, f"not done after {timeout_s:.0f} s", 0)
    if done.returncode == 0:
        return Outcome(json.loads(done.stdout.splitlines()[-1]), "", done.peak_bytes)
    last = (done.stderr.strip().splitlines() or [""])[-1][-200:]
    return Outcome(None, "killed" if done.returncode == -9 else f"exit {done.returncode}: {last}", done.peak_bytes)


def disk_bandwidth(file: Path, block_bytes: int, seconds: float = 4.0, in_flight: int = 2) -> float:
    """Bytes per second of direct reads at random places of an existing file.

    Seconds, since some disks are faster for a moment than they can stay (3.7 and then 1.5 GB/s on one cloud machine).
    """
    block = -(-block_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    places = max(1, file.stat().st_size // block)
    fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
    began = time.perf_counter()

    def read_on(seed: int) -> int:
        rng, total = np.random.default_rng(seed), 0
        with mmap.mmap(-1, block) as buffer:
            while time.perf_counter() - began < seconds:
                total += os.preadv(fd, [buffer], int(rng.integers(places)) * block)
        return total

    try:
        with ThreadPoolExecutor(in_flight) as pool:
            return sum(pool.map(read_on, range(in_flight))) / (time.perf_counter() - began)
    finally:
        os.close(fd)


def append_row(file: Path, row: dict) -> None:
    """Keep a row as soon as it is measured."""
    with open(file, "a") as rows:
        rows.write(json.dumps(row) + "\n")


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def command_line() -> str:
    """The command that is running, as it is printed below a table."""
    script = Path(sys.argv[0])
    return " ".join(["python", f"benchmarks/{script.name}", *sys.argv[1:]])
