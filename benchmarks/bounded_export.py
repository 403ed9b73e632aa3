"""Exports and quantizes a checkpoint under a memory limit that kills, in one go; prints time and memory.

    python benchmarks/make_checkpoint.py olmoe-1b-7b -o CHECKPOINT     # 14 GB
    python benchmarks/bounded_export.py CHECKPOINT -o BUNDLE [--memory 4GiB] [--scheme int4] [--kill-after SECONDS]

With --kill-after the export is killed (SIGKILL) after that time and started again, until it ends within it. Needs
root, for the memory cgroup. Anonymous memory is what cannot be dropped: the cgroup counts the page cache too, which
fills whatever limit there is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from pocketmoe.profiles.machine.limit import run_limited

_SAMPLE_S = 0.1


@dataclass
class Measured:
    """One attempt, or all of them together."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_anonymous_bytes: int = 0
    bytes_read: int = 0  # from the disk, as the kernel counts for the process
    bytes_written: int = 0

    def add(self, other: Measured) -> None:
        self.seconds += other.seconds
        self.cpu_seconds += other.cpu_seconds
        self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, other.peak_anonymous_bytes)
        self.bytes_read += other.bytes_read
        self.bytes_written += other.bytes_written


class Watch(threading.Thread):
    """Samples the memory and the disk traffic of this process's children; kills them after a while if asked to."""

    def __init__(self, kill_after_s: float | None) -> None:
        super().__init__(daemon=True)
        self.found = Measured()
        self.killed = False
        self._kill_after_s = kill_after_s
        self._done = threading.Event()

    def run(self) -> None:
        began = time.monotonic()
        while not self._done.wait(_SAMPLE_S):
            children = psutil.Process().children(recursive=True)
            late = self._kill_after_s is not None and time.monotonic() - began > self._kill_after_s
            for child in children:
                with contextlib.suppress(psutil.Error, OSError, StopIteration):
                    self._sample(child)
                    if late:
                        child.kill()
                        self.killed = True

    def _sample(self, child: psutil.Process) -> None:
        status = Path(f"/proc/{child.pid}/status").read_text()
        anonymous = 1024 * int(next(iter(re.findall(r"RssAnon:\s+(\d+)", status)), 0))  # none: it has just ended
        self.found.peak_anonymous_bytes = max(self.found.peak_anonymous_bytes, anonymous)
        self.found.cpu_seconds = max(self.found.cpu_seconds, sum(child.cpu_times()[:2]))
        io = child.io_counters()
        self.found.bytes_read = max(self.found.bytes_read, io.read_bytes)
        self.found.bytes_written = max(self.found.bytes_written, io.write_bytes)

    def stop(self) -> Measured:
        self._done.set()
        self.join()
        return self.found


def attempt(command: list[str], limit_bytes: int | None, kill_after_s: float | None) -> tuple[Measured, bool]:
    """Run the command once; what it took, and whether it was killed by us. Exits when it fails by itself."""
    watch, began = Watch(kill_after_s), time.monotonic()
    watch.start()
    done = run_limited(command, limit_bytes, timeout_s=24 * 3600)
    measured = watch.stop()
    measured.seconds = time.monotonic() - began
    print(done.stderr.strip(), file=sys.stderr)
    if done.returncode and not watch.killed:
        sys.exit(f"failed with {done.returncode} after {measured.seconds:.0f} s (-9: over the limit)")
    return measured, watch.killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--memory", default="4GiB", help="of the cgroup; 0: no limit")
    parser.add_argument("--scheme", default="int4", help="fp32: no quantizing")
    parser.add_argument("--kill-after", type=float, metavar="SECONDS")
    args = parser.parse_args()
    number, unit = re.fullmatch(r"(\d+)(GiB|MiB|)", args.memory).groups()
    limit = int(number) * {"GiB": 1 << 30, "MiB": 1 << 20, "": 1}[unit] or None
    command = [sys.executable, "-m", "pocketmoe.cli", "export", str(args.checkpoint), "-o", str(args.output)]
    command += [] if args.scheme == "fp32" else ["--scheme", args.scheme]
    total, attempts = Measured(), 0
    while True:
        measured, killed = attempt(command, limit, args.kill_after)
        total.add(measured)
        attempts += 1
        if not killed:
            break
    size = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(json.dumps({**asdict(total), "limit_bytes": limit, "attempts": attempts, "bundle_bytes": size}))


if __name__ == "__main__":
    main()
