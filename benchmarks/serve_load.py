"""A server under load, in a memory cgroup of its budget: nothing lost, nothing wrong, memory kept, how long it takes.

    python benchmarks/serve_load.py BUNDLE [--memory 240MB] [--requests 1000] [--clients 1 4 8] [--json FILE]

Needs root for the cgroup. Requests continue pieces of a text, 8 to 600 tokens of it, with 4 to 48 tokens; every second
one is streamed, every tenth is from a client that goes away, in the queue, in the prompt or in the answer. Each answer
is compared, token by token, with what a model of one text at a time gives for that prompt in this process.

First token: from the request to the first piece, so waiting for a place is part of it. Per token: the time between the
first and the last piece, over the tokens between them. Both from streamed requests.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import queue
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

import pocketmoe
from pocketmoe.profiles.machine.limit import Limited, run_limited
from pocketmoe.sizes import parse_size

TEXT = Path(__file__).parents[1] / "models/reference/calibration.txt"
DISTINCT = 100  # requests; what is asked again has a prefix that the server may have kept


@dataclass(frozen=True)
class Asked:
    """A request, and the tokens that are right."""

    ids: list[int]
    most: int
    right: list[int]


@dataclass
class Seen:
    """What came of the requests of one round."""

    first_s: list[float] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    tokens: int = 0
    answered: int = 0
    vanished: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def make_requests(bundle: Path, text: Path, seed: int) -> list[Asked]:
    """Pieces of a text of many lengths, with the tokens that follow by a model that answers one at a time."""
    rng = random.Random(seed)
    with pocketmoe.load(bundle, memory="100%") as model:
        ids = model.tokenize(text.read_text(encoding="utf-8")[:400_000])
        found: list[Asked] = []
        for _ in range(DISTINCT):
            length = min(round(8 * 75 ** rng.random()), model.context_length - 64)
            start = rng.randrange(len(ids) - length)
            prompt, most = ids[start : start + length], rng.randint(4, 48)
            result = model.generate(prompt, max_tokens=most, authors=True, temperature=0)
            assert not result.reused_tokens, "each is computed anew"
            found.append(Asked(prompt, most, list(result.tokens)))
        return found


class Client(threading.Thread):
    """Takes requests from a queue until it is empty, one connection for each."""

    def __init__(self, port: int, name: str, work: queue.Queue[tuple[int, Asked]], seen: Seen) -> None:
        super().__init__()
        self._port, self._model, self._work, self._seen = port, name, work, seen

    def run(self) -> None:
        while True:
            try:
                number, asked = self._work.get_nowait()
            except queue.Empty:
                return
            try:
                self._ask(number, asked)
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                self._seen.lost.append(f"{number}: {error!r}")

    def _ask(self, number: int, asked: Asked) -> None:
        stream, leaves = number % 2 == 0, number % 10 == 9 or number % 20 == 0
        body = {"model": self._model, "prompt": asked.ids, "max_tokens": asked.most, "temperature": 0}
        body |= {"return_token_ids": True, "stream": stream}
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        began = time.perf_counter()
        with contextlib.closing(connection):
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            if leaves and not stream:
                time.sleep(random.Random(number).random() * 0.3)
                self._seen.vanished += 1
                return
            response = connection.getresponse()
            if response.status == 429:
                self._seen.refused += 1
                return
            if response.status != 200:
                raise ValueError(f"status {response.status}: {response.read()[:200]!r}")
            tokens = self._streamed(response, began, leaves) if stream else _whole(response)
        if tokens is None:
            self._seen.vanished += 1
            return
        self._seen.answered += 1
        self._seen.tokens += len(tokens)
        if tokens != asked.right:
            self._seen.wrong.append(f"{number}: {tokens} for {asked.right}")

    def _streamed(self, response: http.client.HTTPResponse, began: float, leaves: bool) -> list[int] | None:
        tokens: list[int] = []
        first = last = 0.0
        before = 0
        for event in _events(response):
            choice = event["choices"][0]
            new = choice.get("token_ids", [])
            if new:
                last = time.perf_counter()
                first, before = (first, before) if tokens else (last, len(new))
                tokens += new
            if leaves and len(tokens) > 1:
                return None
        self._seen.first_s.append(first - began)
        if len(tokens) > before:
            self._seen.token_s.append((last - first) / (len(tokens) - before))
        return tokens


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    while line := response.readline():
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            event = json.loads(line[6:])
            if "error" in event:
                raise ValueError(str(event["error"]))
            yield event


def _whole(response: http.client.HTTPResponse) -> list[int]:
    return json.loads(response.read())["choices"][0]["token_ids"]


class Served:
    """`pocketmoe serve` in a cgroup, as a context manager. `lines`: its log."""

    def __init__(self, bundle: Path, memory: str, options: list[str]) -> None:
        self._command = [sys.executable, "-m", "pocketmoe", "serve", str(bundle), "--name", "model", "--port", "0"]
        self._command += ["--memory", memory, "--queue", "64", *options]
        self._limit = parse_size(memory)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.lines: list[dict[str, Any]] = []
        self.ended: Limited | None = None
        self.port = self.pid = 0

    def _run(self) -> None:
        try:
            self.ended = run_limited(self._command, self._limit, None, self._on_line)
        finally:
            self._ready.set()

    def _on_line(self, line: str) -> None:
        if not line.startswith("{"):
            print(line, end="", file=sys.stderr)
            return
        found = json.loads(line)
        self.lines.append(found)
        if found["event"] == "ready":
            self.port, self.pid = int(found["url"].rpartition(":")[2]), found["pid"]
            self._ready.set()

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        if not self.port:
            raise SystemExit(f"the server did not start: {self.ended}")
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self.pid, signal.SIGTERM)
        self._thread.join()


def measure(served: Served, requests: list[Asked], count: int, clients: int, seed: int) -> dict[str, Any]:
    """One round of so many requests by so many clients at once."""
    work: queue.Queue[tuple[int, Asked]] = queue.Queue()
    rng = random.Random(seed)
    for number in range(count):
        work.put((number, rng.choice(requests)))
    seen = Seen()
    began = time.perf_counter()
    threads = [Client(served.port, "model", work, seen) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    for line in [*seen.wrong[:3], *seen.lost[:3]]:
        print(line[:400], file=sys.stderr)
    percentiles = {
        f"{name}_p{p}_ms": 1000 * float(np.percentile(values, p))
        for name, values in (("first", seen.first_s), ("token", seen.token_s))
        for p in (50, 99)
    }
    counts = {"answered": seen.answered, "vanished": seen.vanished, "refused": seen.refused}
    faults = {"lost": len(seen.lost), "wrong": len(seen.wrong)}
    return {"clients": clients, **counts, **faults, **percentiles, "tokens_per_s": seen.tokens / seconds}


def table(rows: list[dict[str, Any]]) -> str:
    columns = ("clients", "answered", "vanished", "refused", "lost", "wrong")
    head = f"| {' | '.join(columns)} | first token ms p50 / p99 | per token ms p50 / p99 | tokens/s |"
    lines = [head, "|---" * 9 + "|"]
    for row in rows:
        counts = " | ".join(str(row[name]) for name in columns)
        first = f"{row['first_p50_ms']:.0f} / {row['first_p99_ms']:.0f}"
        token = f"{row['token_p50_ms']:.1f} / {row['token_p99_ms']:.1f}"
        lines.append(f"| {counts} | {first} | {token} | {row['tokens_per_s']:.0f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--memory", default="240MB")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--option", action="append", default=[], help="for the server, as --option=--parallel=4")
    args = parser.parse_args()
    requests = make_requests(args.bundle, args.text, seed=1)
    with Served(args.bundle, args.memory, args.option) as served:
        each = args.requests // len(args.clients)
        rows = [measure(served, requests, each, clients, seed) for seed, clients in enumerate(args.clients)]
    assert served.ended is not None
    budget, peak = parse_size(args.memory), served.ended.peak_bytes or 0
    print(table(rows))
    code = served.ended.returncode
    print(f"\nBudget {budget / 1e6:.1f} MB, peak of the cgroup {peak / 1e6:.1f} MB, exit code {code}.")
    failures = [line for line in served.lines if line["event"] in ("failure", "library")]
    for line in failures[:3]:
        print(line, file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps({"budget_bytes": budget, "peak_bytes": peak, "rows": rows}, indent=1))
    faults = sum(row["lost"] + row["wrong"] for row in rows) + len(failures) + abs(code)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
