"""A server under load, in a memory cgroup of its budget: nothing lost, nothing wrong, memory kept, how long it takes.

    python benchmarks/serve_load.py BUNDLE [--memory 240MB] [--requests 1000] [--clients 1 4 8] [--json FILE]
        [--distinct 100] [--longest 600] [--peer GGUF]

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

import pocketmoe
from pocketmoe.profiles.machine.limit import Limited, run_limited
from pocketmoe.sizes import parse_size

TEXT = Path(__file__).parents[1] / "models/reference/calibration.txt"


@dataclass(frozen=True)
class Asked:
    """A request, and the tokens that are right."""

    ids: list[int]
    most: int
    right: list[int]


@dataclass(frozen=True)
class Api:
    """How a server is asked for tokens, and where its answers have them."""

    path: str
    count: str
    options: dict[str, Any]
    tokens: Callable[[dict[str, Any]], list[int]]
    compared: bool

    def body(self, asked: Asked, *, stream: bool) -> bytes:
        wanted = {"prompt": asked.ids, self.count: asked.most, "temperature": 0, "stream": stream}
        return json.dumps(wanted | self.options).encode()


OURS = Api(
    "/v1/completions",
    "max_tokens",
    {"model": "model", "return_token_ids": True},
    lambda answer: answer["choices"][0].get("token_ids", []),
    compared=True,
)
LLAMACPP = Api(
    "/completion",
    "n_predict",
    {"return_tokens": True, "cache_prompt": True},
    lambda answer: answer.get("tokens", []),
    compared=False,
)


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


def make_requests(bundle: Path, text: Path, seed: int, distinct: int, longest: int, answer: int) -> list[Asked]:
    """Pieces of a text of many lengths, with the tokens that follow by a model that answers one at a time.

    `distinct`: what is asked again has a prefix that the server may have kept.
    """
    rng = random.Random(seed)
    with pocketmoe.load(bundle, memory="100%") as model:
        ids = model.tokenize(text.read_text(encoding="utf-8")[:400_000])
        found: list[Asked] = []
        for _ in range(distinct):
            length = min(round(8 * (longest / 8) ** rng.random()), model.context_length - 64)
            start = rng.randrange(len(ids) - length)
            prompt, most = ids[start : start + length], rng.randint(4, answer)
            result = model.generate(prompt, max_tokens=most, authors=True, temperature=0)
            assert not result.reused_tokens, "each is computed anew"
            found.append(Asked(prompt, most, list(result.tokens)))
        return found


class Client(threading.Thread):
    """Takes requests from a queue until it is empty, one connection for each."""

    def __init__(self, port: int, api: Api, work: queue.Queue[tuple[int, Asked]], seen: Seen) -> None:
        super().__init__()
        self._port, self._api, self._work, self._seen = port, api, work, seen

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
        body = self._api.body(asked, stream=stream)
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        began = time.perf_counter()
        with contextlib.closing(connection):
            connection.request("POST", self._api.path, body, {"Content-Type": "application/json"})
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
            if stream:
                tokens = self._streamed(response, began, leaves)
            else:
                tokens = self._api.tokens(json.loads(response.read()))
        if tokens is None:
            self._seen.vanished += 1
            return
        self._seen.answered += 1
        self._seen.tokens += len(tokens)
        if self._api.compared and tokens != asked.right:
            self._seen.wrong.append(f"{number}: {tokens} for {asked.right}")

    def _streamed(self, response: http.client.HTTPResponse, began: float, leaves: bool) -> list[int] | None:
        tokens: list[int] = []
        first = last = 0.0
        before = 0
        for event in _events(response):
            new = self._api.tokens(event)
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


class NotStarted(Exception):
    """What its process said; the limit kills one that needs more to load."""


class Served:
    """A server in a cgroup, as a context manager. `lines`: its log."""

    def __init__(self, command: list[str], limit_bytes: int, api: Api) -> None:
        self._command, self._limit, self.api = [sys.executable, *command], limit_bytes, api
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
            self._thread.join()
            raise NotStarted(f"the server did not start: {self.ended}")
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):  # the limit has killed it
            os.kill(self.pid, signal.SIGTERM)
        self._thread.join()


def serving(bundle: Path, memory: str, options: list[str]) -> Served:
    command = ["-m", "pocketmoe", "serve", str(bundle), "--name", "model", "--port", "0", "--memory", memory]
    return Served([*command, "--queue", "64", *options], parse_size(memory), OURS)


def serving_peer(gguf: Path, memory: str, parallel: int, context: int, options: list[str]) -> Served:
    script = str(Path(__file__).with_name("llamacpp_server.py"))
    command = [script, str(gguf), "--parallel", str(parallel), "--context", str(context), *options]
    return Served(command, parse_size(memory), LLAMACPP)


def measure(served: Served, requests: list[Asked], count: int, clients: int, seed: int) -> dict[str, Any]:
    """One round of so many requests by so many clients at once."""
    work: queue.Queue[tuple[int, Asked]] = queue.Queue()
    rng = random.Random(seed)
    for number in range(count):
        work.put((number, rng.choice(requests)))
    seen = Seen()
    began = time.perf_counter()
    threads = [Client(served.port, served.api, work, seen) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    for line in [*seen.wrong[:3], *seen.lost[:3]]:
        print(line[:400], file=sys.stderr)
    percentiles = {
        f"{name}_p{p}_ms": 1000 * float(np.percentile(values, p)) if values else None
        for name, values in (("first", seen.first_s), ("token", seen.token_s))
        for p in (50, 99)
    }
    counts = {"answered": seen.answered, "vanished": seen.vanished, "refused": seen.refused}
    faults = {"lost": len(seen.lost), "wrong": len(seen.wrong)}
    return {"clients": clients, **counts, **faults, **percentiles, "tokens_per_s": seen.tokens / seconds}


def table(rows: list[dict[str, Any]]) -> str:
    columns = ("clients", "answered", "vanished", "refused", "lost", "wrong")
    head = f"| server | {' | '.join(columns)} | first token ms p50 / p99 | per token ms p50 / p99 | tokens/s |"
    lines = [head, "|---" * 10 + "|"]
    for row in rows:
        counts = " | ".join(str(row[name]) for name in columns)
        first, token = (
            " / ".join("-" if row[f"{what}_p{p}_ms"] is None else f"{row[f'{what}_p{p}_ms']:.1f}" for p in (50, 99))
            for what in ("first", "token")
        )
        lines.append(f"| {row['server']} | {counts} | {first} | {token} | {row['tokens_per_s']:.1f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--memory", default="240MB")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--distinct", type=int, default=100, help="requests; the rest are some of these again")
    parser.add_argument("--longest", type=int, default=600, help="prompt, in tokens")
    parser.add_argument("--answer", type=int, default=48, help="its longest, in tokens")
    parser.add_argument("--peer", type=Path, metavar="GGUF", help="llama.cpp's file of the same weights")
    parser.add_argument("--option", action="append", default=[], help="for the server, as --option=--parallel=4")
    args = parser.parse_args()
    requests = make_requests(args.bundle, args.text, 1, args.distinct, args.longest, args.answer)
    servers = {"pocketmoe": serving(args.bundle, args.memory, args.option)}
    if args.peer:
        for name, options in (("llama.cpp", []), ("llama.cpp, not repacked", ["--no-repack"])):
            servers[name] = serving_peer(args.peer, args.memory, max(args.clients), args.longest + args.answer, options)
    rows, faults, peaks = [], 0, {}
    for name, served in servers.items():
        try:
            with served:
                each = args.requests // len(args.clients)
                measured = [measure(served, requests, each, clients, seed) for seed, clients in enumerate(args.clients)]
        except NotStarted as error:
            if served.api is OURS:
                raise SystemExit(str(error)) from error
            print(f"{name}: {error}", file=sys.stderr)
            continue
        rows += [{"server": name} | row for row in measured]
        assert served.ended is not None
        peaks[name] = served.ended.peak_bytes or 0
        faults += faults_of(served, measured) if served.api is OURS else 0
    budget = parse_size(args.memory)
    print(table(rows))
    peak = ", ".join(f"{name} {nbytes / 1e6:.1f} MB" for name, nbytes in peaks.items())
    print(f"\nBudget {budget / 1e6:.1f} MB; peaks of the cgroups: {peak}.")
    if args.json:
        args.json.write_text(json.dumps({"budget_bytes": budget, "peak_bytes": peaks, "rows": rows}, indent=1))
    return 1 if faults else 0


def faults_of(served: Served, rows: list[dict[str, Any]]) -> int:
    """Lost and wrong answers, failures in the log, and an end that is none."""
    assert served.ended is not None
    failures = [line for line in served.lines if line["event"] in ("failure", "library")]
    for line in failures[:3]:
        print(line, file=sys.stderr)
    return sum(row["lost"] + row["wrong"] for row in rows) + len(failures) + abs(served.ended.returncode)


if __name__ == "__main__":
    sys.exit(main())
