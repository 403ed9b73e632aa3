"""A server for hours with a quarter of the experts, in a cgroup of its budget: is memory flat, is every answer right?

    python benchmarks/serve_soak.py BUNDLE [--hours 2] [--share 25%] [--every 3] [--clients 4] [--samples FILE]

Needs root. A few clients ask now and then, by all APIs: completions, chat, messages, responses, streamed or not, some
held to a schema. Some go away, some send what is no request. Each answer is compared with what a model of one text at
a time gives for it in this process. Every minute a line of JSON is appended to the samples: what the server's process
and its cgroup take (`held`: anonymous and shared memory, slots counted once), threads, open files, counts so far.

Slopes are those of lines through the samples after the first tenth. Exits 1 for a wrong or lost answer, a failure in
the log, an end that is none, or memory that grows by more than 1 MB in as much time again.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import json
import os
import random
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from machine import append_row, command_line, read_rows
from serve_load import OURS, TEXT, Served, serving

import pocketmoe
from pocketmoe.bundle.manifest import MANIFEST, FileEntry, read_manifest, seal

TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green", "blue"]}, "sure": {"type": "boolean"}},
    "required": ["colour", "sure"],
    "additionalProperties": False,
}
MOST_GROWTH_BYTES = 1_000_000
PLACES = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))


@dataclass(frozen=True)
class Asked:
    """A request without its `stream`, and the answer's text that is right."""

    path: str
    body: dict[str, Any]
    right: str


@dataclass
class Seen:
    """What came of the requests so far, by kind; what is wrong or lost in words."""

    counts: Counter[str] = field(default_factory=Counter[str])
    faults: list[str] = field(default_factory=list[str])


def with_template(bundle: Path, folder: Path) -> Path:
    """A copy with a chat template, for a model that has none; it is packed anew."""
    copy = folder / "model"
    shutil.copytree(bundle, copy, ignore=shutil.ignore_patterns("packed"))
    name, whole = "tokenizer/chat_template.jinja", read_manifest(copy / MANIFEST)
    if name not in whole.files:
        (copy / name).write_text(TEMPLATE)
        entry = FileEntry(nbytes=len(TEMPLATE), sha256=hashlib.sha256(TEMPLATE.encode()).hexdigest())
        (copy / MANIFEST).write_bytes(seal(msgspec.structs.replace(whole, files={**whole.files, name: entry})))
    return copy


def make_requests(bundle: Path, text: Path, count: int) -> list[Asked]:
    """Of every kind in turn, with prompts of 8 to 400 tokens and answers of 4 to 40."""
    rng = random.Random(1)
    words = text.read_text(encoding="utf-8")[:400_000]
    makers = [completion, chat, message, response, chat_schema]
    with pocketmoe.load(bundle, memory="100%") as model:
        found: list[Asked] = []
        for number in range(count):
            start, length = rng.randrange(len(words) - 2000), round(30 * 50 ** rng.random())
            found.append(makers[number % len(makers)](model, words[start : start + length], rng.randint(4, 40)))
        return found


def completion(model: Any, text: str, most: int) -> Asked:
    right = model.generate(text, max_tokens=most, raw=True, authors=True, temperature=0).text
    return Asked("/v1/completions", {"prompt": text, "max_tokens": most, "temperature": 0}, right)


def chat(model: Any, text: str, most: int, **options: Any) -> Asked:
    said = [{"role": "system", "content": "Go on."}, {"role": "user", "content": text}]
    right = model.generate(said, max_tokens=most, authors=True, temperature=0, **options).content
    return Asked("/v1/chat/completions", {"messages": said, "max_tokens": most, "temperature": 0}, right)


def chat_schema(model: Any, text: str, most: int) -> Asked:  # noqa: ARG001 - an answer by a schema ends by itself
    asked = chat(model, text, 100, json_schema=SCHEMA)
    wanted = {"type": "json_schema", "json_schema": {"name": "colour", "schema": SCHEMA}}
    return Asked(asked.path, asked.body | {"response_format": wanted}, asked.right)


def message(model: Any, text: str, most: int) -> Asked:
    body = chat(model, text, most).body
    right = model.generate(body["messages"], max_tokens=most, authors=True, temperature=0).content
    given = {"system": "Go on.", "messages": body["messages"][1:], "max_tokens": most, "temperature": 0}
    return Asked("/v1/messages", given, right)


def response(model: Any, text: str, most: int) -> Asked:
    right = chat(model, text, most).right
    given = {"instructions": "Go on.", "input": text, "max_output_tokens": most, "temperature": 0}
    return Asked("/v1/responses", given, right)


def text_of(told: dict[str, Any]) -> str:
    """Of an answer, or of an event of one, by any of the APIs."""
    if told.get("error"):
        raise ValueError(str(told["error"]))
    if "choices" in told:
        return "".join(
            choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get("content") or ""
            for choice in told["choices"]
        )
    if told.get("type") == "content_block_delta":
        return told["delta"].get("text", "")
    if told.get("type") == "response.output_text.delta":
        return told["delta"]
    if told.get("type") == "message":
        return "".join(block["text"] for block in told["content"])
    parts = [part for item in told.get("output", ()) for part in item.get("content", ())]
    return "".join(part["text"] for part in parts)


MALFORMED: list[tuple[str, bytes]] = [
    ("/v1/completions", b'{"model": "model", "prompt": '),
    ("/v1/completions", b'{"model": "model", "prompt": "a", "max_tokens": -1}'),
    ("/v1/completions", b'{"model": "nobody", "prompt": "a"}'),
    ("/v1/completions", b'{"model": "model", "prompt": [99999999]}'),
    ("/v1/chat/completions", b'{"model": "model", "messages": []}'),
    ("/v1/chat/completions", b"[" * 2000),
    ("/v1/chat/completions", b"\xff\xfe\x00"),
    ("/v1/chat/completions", b'{"model": "model", "messages": [{"role": "user", "content": "a"}], "unknown": 1}'),
    ("/v1/messages", b'{"model": "model", "max_tokens": 4, "messages": [{"role": "user", "content": 7}]}'),
    ("/v1/responses", b'{"model": "model", "input": "a", "store": true}'),
    ("/v1/completions", json.dumps({"model": "model", "prompt": "a " * 40_000}).encode()),
    ("/tokenize", b"null"),
    ("/nothing", b"{}"),
    ("", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100)),  # no HTTP at all
]


class Client(threading.Thread):
    """Asks now and then, until it is told to stop."""

    def __init__(self, port: int, requests: list[Asked], pause_s: float, seed: int, seen: Seen) -> None:
        super().__init__()
        self._port, self._requests, self._pause_s, self._seen = port, requests, pause_s, seen
        self._rng = random.Random(seed)
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(self._rng.expovariate(1 / self._pause_s)):
            act = self._malformed if self._rng.random() < 0.1 else self._ask
            try:
                act()
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                self._seen.faults.append(f"lost: {error!r}"[:600])

    def _malformed(self) -> None:
        path, body = self._rng.choice(MALFORMED)
        if not path:
            with socket.create_connection(("127.0.0.1", self._port), timeout=60) as connection:
                connection.sendall(body)
                answer = connection.recv(100)
            status = int(answer.split()[1]) if answer else 400
        else:
            with self._posted(path, body) as connection:
                answer = connection.getresponse()
                status, body = answer.status, answer.read()
                assert json.loads(body)["error"]["message"]
        self._seen.counts["malformed"] += 1
        if not 400 <= status < 500:
            self._seen.faults.append(f"wrong: status {status} of a malformed request to {path}")

    def _ask(self) -> None:
        asked, streams, leaves = self._rng.choice(self._requests), self._rng.random() < 0.5, self._rng.random() < 0.1
        with self._posted(asked.path, json.dumps({"model": "model", "stream": streams} | asked.body)) as connection:
            if leaves and not streams:
                time.sleep(self._rng.random() * 0.2)
                self._seen.counts["vanished"] += 1
                return
            answer = connection.getresponse()
            if answer.status != 200:
                raise ValueError(f"{asked.path}: status {answer.status}: {answer.read()[:200]!r}")
            found = ""
            for piece in pieces(answer) if streams else [json.loads(answer.read())]:
                found += text_of(piece)
                if leaves and found:
                    self._seen.counts["vanished"] += 1
                    return
        self._seen.counts[f"{asked.path}{' streamed' * streams}"] += 1
        if found != asked.right:
            self._seen.faults.append(f"wrong: {asked.path} {found!r} for {asked.right!r}"[:600])

    @contextlib.contextmanager
    def _posted(self, path: str, body: bytes | str) -> Iterator[http.client.HTTPConnection]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        with contextlib.closing(connection):
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            yield connection


def pieces(answer: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    while line := answer.readline():
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            yield json.loads(line[6:])


def sample(served: Served, seen: Seen, began: float) -> dict[str, Any]:
    """What the server takes now, in bytes, and what it has done."""
    process = Path(f"/proc/{served.pid}")
    rollup = {
        name: int(rest.split()[0]) << 10
        for name, _, rest in (line.partition(":") for line in (process / "smaps_rollup").read_text().splitlines()[1:])
    }
    status = dict(line.split(":\t") for line in (process / "status").read_text().splitlines() if ":\t" in line)
    ticks = (process / "stat").read_text().rpartition(") ")[2].split()
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)) as connection:
        connection.request("GET", "/pocketmoe/state")
        state = json.loads(connection.getresponse().read())
    return {
        "at_s": round(time.monotonic() - began, 1),
        "rss": rollup["Rss"], "pss": rollup["Pss"], "anonymous": rollup["Anonymous"],
        **cgroup_bytes(process),
        "used": state["used_bytes"], "peak": state["peak_bytes"], "budget": state["budget_bytes"],
        "hits": state["models"][0]["counts"]["hits"], "misses": state["models"][0]["counts"]["misses"],
        "threads": int(status["Threads"]), "files": len(list((process / "fd").iterdir())),
        "cpu_s": (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK"),
        "faults": len(seen.faults), **seen.counts,
    }  # fmt: skip


def cgroup_bytes(process: Path) -> dict[str, int]:
    """What the process's memory cgroup is charged for, and what of that it cannot give back."""
    lines = [line.split(":") for line in (process / "cgroup").read_text().splitlines()]
    controller, path = next(line[1:] for line in lines if line[1] in ("", "memory"))
    group = PLACES[not controller] / path.lstrip("/")
    stat = {name: int(value) for name, value in map(str.split, (group / "memory.stat").read_text().splitlines())}
    usage = group / ("memory.usage_in_bytes" if controller else "memory.current")
    held = stat["rss" if controller else "anon"] + stat["shmem"]
    return {"cgroup": int(usage.read_text()), "held": held}


def slope_per_hour(rows: list[dict[str, Any]], name: str) -> float:
    """Of the line through the samples after the first tenth."""
    settled = rows[len(rows) // 10 :]
    return float(np.polyfit([row["at_s"] / 3600 for row in settled], [row[name] for row in settled], 1)[0])


def table(rows: list[dict[str, Any]]) -> str:
    settled = rows[len(rows) // 10 :]
    lines = ["| | first tenth | least and most after it | slope per hour |", "|---" * 4 + "|"]
    for name in ("rss", "pss", "anonymous", "cgroup", "held", "used"):
        values = [row[name] / 1e6 for row in settled]
        slope = slope_per_hour(rows, name) / 1e3
        first = max(row[name] for row in rows[: max(1, len(rows) // 10)]) / 1e6
        lines.append(f"| {name}, MB | {first:.1f} | {min(values):.1f}, {max(values):.1f} | {slope:+.1f} kB |")
    for name in ("threads", "files"):
        values = [row[name] for row in settled]
        lines.append(f"| {name} | {rows[0][name]} | {min(values)}, {max(values)} | {slope_per_hour(rows, name):+.2f} |")
    return "\n".join(lines)


def soak(served: Served, hours: float, clients: list[Client], watch: Callable[[], None]) -> None:
    """Let the clients ask for so long, and call `watch` every minute."""
    until = time.monotonic() + hours * 3600
    for client in clients:
        client.start()
    try:
        while (left := until - time.monotonic()) > 0 and served.ended is None:
            time.sleep(min(60.0, left))
            if served.ended is None:
                watch()
    finally:
        for client in clients:
            client.stopped.set()
        for client in clients:
            client.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--share", default="25%", help="of the experts, that are in memory")
    parser.add_argument("--every", type=float, default=3.0, metavar="SECONDS", help="a request, on average")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--distinct", type=int, default=100)
    parser.add_argument("--samples", type=Path, default=Path("serve_soak.jsonl"))
    parser.add_argument("--option", action="append", default=[], help="for the server, as --option=--context=512")
    args = parser.parse_args()
    args.samples.unlink(missing_ok=True)
    options = ["--parallel", "4", *args.option]
    with tempfile.TemporaryDirectory() as folder:
        bundle = with_template(args.bundle, Path(folder))
        requests = make_requests(bundle, args.text, args.distinct)
        with Served(command(bundle, args.share, options), None, OURS) as served:
            budget = next(line["budget"] for line in served.lines if line["event"] == "loaded")
        served, seen, began = serving(bundle, str(budget), options), Seen(), time.monotonic()
        with served:
            pause = args.every * args.clients
            clients = [Client(served.port, requests, pause, seed, seen) for seed in range(args.clients)]
            watch = lambda: append_row(args.samples, sample(served, seen, began))  # noqa: E731
            watch()
            soak(served, args.hours, clients, watch)
    return report(args.samples, served, seen, budget)


def command(bundle: Path, share: str, options: list[str]) -> list[str]:
    return ["-m", "pocketmoe", "serve", str(bundle), "--name", "model", "--port", "0", "--memory", share, *options]


def report(samples: Path, served: Served, seen: Seen, budget: int) -> int:
    """Print what was found; the exit code."""
    rows, ended = read_rows(samples), served.ended
    assert ended is not None
    failures = [str(line)[:600] for line in served.lines if line["event"] in ("failure", "library")]
    for line in [*seen.faults[:10], *failures[:10]]:
        print(line)
    last, hours = rows[-1], rows[-1]["at_s"] / 3600
    print(table(rows))
    done = ", ".join(f"{count} {kind}" for kind, count in sorted(seen.counts.items()))
    hits, cpu = last["hits"] / (last["hits"] + last["misses"]), last["cpu_s"] / last["at_s"]
    print(f"\n{hours:.2f} hours: {done}. {len(seen.faults)} wrong or lost, {len(failures)} failures in the log.")
    peak = (ended.peak_bytes or 0) / 1e6
    print(f"Budget {budget / 1e6:.1f} MB, the cgroup's peak {peak:.1f} MB; hits {hits:.0%}; {cpu:.0%} of a CPU.")
    print(f"\n`{command_line()}`")
    grown = max(slope_per_hour(rows, name) for name in ("held", "anonymous")) * hours
    return int(bool(seen.faults or failures or ended.returncode or grown > MOST_GROWTH_BYTES))


if __name__ == "__main__":
    sys.exit(main())
