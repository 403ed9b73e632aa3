"""What strangers may send a server: requests made by its own OpenAPI description, with faults, and bytes that are none.

    python -m tests.serve.malformed [--cases 10000] [--seed N] [--start N]

A case is made of seed and number alone. The server is a process of its own, with the smallest model that can be held to
JSON and to calls. Wrong are a status of 500 or more, an answer that is no answer of an API, a failure in the log, a
server that is gone, memory that grows, and a good request that is answered otherwise than at first. Exit code 1 then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, Self

import psutil

from pocketmoe.serve.api.openapi import REQUESTS, description
from tests.serve.client import write_speaker

MODEL = "speaker"
GOOD = {"model": MODEL, "prompt": "abc", "max_tokens": 8}
MOST_GROWTH_BYTES = 4 << 20  # in the second half
WAIT_S = 60.0
IMPATIENT_S = 0.3
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 2**31, 2**63, -(2**63) - 1, 2**64, 10**30, 0.5, -0.0, 1e308, 1e-320, float("nan"),
    float("inf"), "", "a", "\0", "\ud800", "\ufeff", "a\u0301\U0001f600" * 50, "x" * 5000, [], {}, [[]], [None],
    {"": {}}, {"type": "text", "text": "a"}, {"type": "image_url"}, {"$ref": "#"}, {"type": "object"}, [1, "a"],
    "auto", "none",
]  # fmt: skip
WORDS = ["a", "abc", "get_it", "user", "a\U0001f600\n<tool_call>"]
LINES = [
    b"content-length: 5", b"content-length: -1", b"content-length: 99999999999999999999", b"content-length: 0",
    b"transfer-encoding: chunked", b"transfer-encoding: gzip, chunked", b"expect: 100-continue", b"expect: 999",
    b"content-encoding: gzip", b"content-type: text/plain", b"content-type: ", b"host: evil.example", b"host: [::1]",
    b"host: [::1", b"host:", b"host: 127.0.0.1:99999", b"origin: https://evil.example", b"origin: null",
    b"connection: close", b"connection: upgrade, http2-settings", b"upgrade: h2c", b"x: " + b"y" * 9000,
    b" folded: yes", b"no colon", b": no name", b"accept: \xff\xfe", b"authorization: Bearer " + b"\x80" * 20,
    b"te: trailers", b"content-type: application/json; charset=utf-16", b"range: bytes=0-1",
    b"x\0y: z", b"x-request-id: \x1b[31m",
]  # fmt: skip
STARTS = [
    b"POST %s HTTP/1.1", b"POST %s HTTP/1.0", b"POST %s HTTP/2.0", b"POST %s HTTP/1.1 ", b"post %s HTTP/1.1",
    b"POST %s", b"GET %s HTTP/1.1", b"HEAD %s HTTP/1.1", b"OPTIONS %s HTTP/1.1", b"PUT %s HTTP/1.1",
    b"CONNECT %s HTTP/1.1", b"TRACE %s HTTP/1.1", b"POST http://127.0.0.1%s HTTP/1.1",
    b"POST %s/../..%%2f%%00 HTTP/1.1",
    b"POST %s?a=%%ff#x HTTP/1.1",
    b"POST /%s HTTP/1.1", b"PRI * HTTP/2.0\r\n\r\nSM", b"POST \xff%s HTTP/1.1", b"\x16\x03\x01\x02\x00\x01%s",
]  # fmt: skip


class Described:
    """Makes values by the API's description; a part of them not as it says."""

    def __init__(self, rng: Random, faults: float) -> None:
        self._rng, self._faults = rng, faults
        whole = json.loads(description())
        self._known: dict[str, Any] = whole["components"]["schemas"]
        self._paths: dict[str, Any] = whole["paths"]

    def body(self, path: str) -> Any:
        """Of a request to a path."""
        content = self._paths[path]["post"]["requestBody"]["content"]["application/json"]
        found = self.value(content["schema"], 0)
        if isinstance(found, dict) and self._rng.random() < 0.95:
            found["model"] = MODEL
            for name in {"max_tokens", "max_output_tokens", "max_completion_tokens"} & {*found}:
                if isinstance(found[name], int) and found[name] > 8:
                    found[name] = self._rng.randint(1, 8)
            if path in ("/v1/chat/completions", "/v1/responses") and self._rng.random() < 0.9:
                found.setdefault("max_output_tokens" if path.endswith("s/responses") else "max_tokens", 4)
        return found

    def value(self, schema: dict[str, Any], depth: int) -> Any:
        rng = self._rng
        if rng.random() < self._faults:
            return rng.choice(ODD)
        if "$ref" in schema:
            return self.value(self._known[schema["$ref"].rpartition("/")[2]], depth)
        for union in ("anyOf", "oneOf"):
            if union in schema:
                return self.value(rng.choice(schema[union]), depth)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return rng.choice(schema["enum"])
        kind = schema.get("type")
        make: dict[Any, Callable[[], Any]] = {
            "object": lambda: self._object(schema, depth),
            "array": lambda: self._array(schema, depth),
            "string": lambda: rng.choice(
                ["a", "abc", "get_it", "user", "a\U0001f600\n<tool_call>", "x" * rng.randint(1, 300)]
            ),
            "integer": lambda: self._number(schema, 1),
            "number": lambda: self._number(schema, 0.25),
            "boolean": lambda: rng.random() < 0.5,
            "null": lambda: None,
        }
        return make[kind]() if kind in make else rng.choice(ODD)

    def _object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        rng, known = self._rng, schema.get("properties", {})
        wanted = [name for name in known if name in schema.get("required", ()) or rng.random() < 0.25 / (1 + depth / 2)]
        found = {name: self.value(known[name], depth + 1) for name in wanted if rng.random() >= self._faults}
        more = schema.get("additionalProperties")
        if isinstance(more, dict) and rng.random() < 0.5:
            found[rng.choice(["1", "type", "a"])] = self.value(more, depth + 1)
        if rng.random() < self._faults:
            found[rng.choice(["unknown", "", "__proto__", "audio", "functions"])] = rng.choice(ODD)
        return found

    def _array(self, schema: dict[str, Any], depth: int) -> list[Any]:
        least, most = schema.get("minItems", 0), min(schema.get("maxItems", 4), 4)
        return [
            self.value(schema.get("items", {}), depth + 1) for _ in range(self._rng.randint(min(least, most), most))
        ]

    def _number(self, schema: dict[str, Any], step: float) -> Any:
        least = schema.get("minimum", schema.get("exclusiveMinimum", -5))
        most = schema.get("maximum", schema.get("exclusiveMaximum", 5))
        inside = least + step * self._rng.randint(0, int(min(most - least, 40) / step))
        return self._rng.choice([inside, inside, inside, least, most, least - step, most + step])


def request_of(seed: int, number: int) -> tuple[str, bytes]:
    """A case: what it is, and all bytes that are sent."""
    rng = Random(f"{seed}:{number}")
    path = rng.choice([*REQUESTS])
    kind = rng.choice(["described", "described", "described", "faulty", "faulty", "http", "bytes"])
    made = Described(rng, 0.08 if kind == "faulty" else 0.004)
    body = json.dumps(made.body(path), ensure_ascii=True).encode()
    if kind == "faulty" and rng.random() < 0.3:
        body = mutated(rng, body)
    start, lines = STARTS[0], [b"host: 127.0.0.1", b"content-type: application/json", b"connection: close"]
    length = [b"content-length: %d" % len(body)]
    if kind == "http":
        start = rng.choice(STARTS)
        for _ in range(rng.randint(0, 3)):
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(LINES))
        if rng.random() < 0.2:
            length = [b"transfer-encoding: chunked"]
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body) + rng.choice([0, 0, 0, 1, 10**6]), body)
        if rng.random() < 0.1:
            lines.remove(rng.choice(lines))
    sent = b"\r\n".join([start % path.encode() if b"%s" in start else start, *lines, *length, b"", b""]) + body
    if kind == "http" and rng.random() < 0.1:
        sent += sent  # the next request before the answer to this one
    return kind, mutated(rng, sent) if kind == "bytes" else sent


def mutated(rng: Random, data: bytes) -> bytes:
    """Some bytes changed, gone, or there twice."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(found) + 1), rng.randint(0, 12)
        change = rng.choice(["other", "gone", "twice", "cut"])
        if change == "other":
            found[at : at + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 3))
        elif change == "gone":
            del found[at : at + length]
        elif change == "twice":
            found[at:at] = found[at : at + 20 * length]
        elif rng.random() < 0.2:
            del found[at:]
    return bytes(found)


def exchange(port: int, data: bytes, patient: bool = True) -> bytes:
    """All that comes back until the server closes. Not `patient`: what may be no whole request ends after a while."""
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as connection:
        found = b""
        with contextlib.suppress(ConnectionError):  # it has closed already
            connection.sendall(data)
            connection.settimeout(WAIT_S if patient else IMPATIENT_S)
            while True:
                try:
                    piece = connection.recv(1 << 16)
                except TimeoutError:
                    if connection.gettimeout() == WAIT_S:
                        raise
                    connection.settimeout(WAIT_S)
                    connection.shutdown(socket.SHUT_WR)
                    continue
                if not piece:
                    break
                found += piece
        return found


def fault_of(kind: str, answer: bytes) -> str:
    """What is wrong with an answer; "" where nothing is."""
    if not answer:
        return "" if kind in ("http", "bytes") else "no answer"
    while answer.startswith(b"HTTP/1.1 100 "):
        answer = answer.partition(b"\r\n\r\n")[2]
    status = re.match(rb"HTTP/1\.1 (\d\d\d) ", answer)
    if not status:
        return "" if kind in ("http", "bytes") and not answer else f"no HTTP: {answer[:60]!r}"
    code = int(status[1])
    head, _, body = answer.partition(b"\r\n\r\n")
    if code >= 500:
        return f"status {code}"
    if b'"server_error"' in body or b'"api_error"' in body:
        return "an error of the server's in a stream"
    if kind in ("described", "faulty") and code >= 400:
        try:
            return "" if json.loads(body)["error"]["message"] else "an error without a message"
        except (ValueError, KeyError, TypeError):
            return f"status {code} without the API's error"
    if kind in ("described", "faulty") and b"application/json" in head.lower():
        try:
            json.loads(body)
        except ValueError:
            return "an answer that is no JSON"
    return ""


def answered(port: int) -> bytes:
    """The text of the answer to a good request."""
    body = json.dumps(GOOD).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
    )
    found = exchange(port, head + b"content-length: %d\r\n\r\n" % len(body) + body)
    return json.dumps(json.loads(found.partition(b"\r\n\r\n")[2])["choices"]).encode()


def campaign(
    port: int, seed: int, numbers: range, look: Callable[[int], None] = lambda _: None
) -> tuple[Any, list[str]]:
    """Counts by kind and status, and faults, each with the case that shows it. `look`: called before each case."""
    counts: Counter[str] = Counter()
    faults: list[str] = []
    right = answered(port)
    for number in numbers:
        look(number)
        kind, data = request_of(seed, number)
        try:
            answer = exchange(port, data, patient=kind in ("described", "faulty"))
            fault = fault_of(kind, answer)
        except OSError as error:
            answer, fault = b"", f"{error!r}"
        counts[f"{kind} {answer[9:12].decode('latin-1') or 'closed'}"] += 1
        if fault:
            faults.append(f"{seed}:{number} {fault} | {data[:300]!r}")
    if answered(port) != right:
        faults.append("a good request is answered otherwise than before")
    return counts, faults


class Server:
    """One in a process of its own, as a context manager."""

    def __init__(self, root: Path) -> None:
        command = [sys.executable, "-m", "pocketmoe", "serve", str(root), "--port", "0", "--memory", "400MB"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.port = 0
        self.failures: list[str] = []
        self._ready = threading.Event()
        self._listener = threading.Thread(target=self._listen, daemon=True)

    def _listen(self) -> None:
        for line in self.process.stderr or ():
            found = json.loads(line) if line.startswith("{") else {"event": "said"}
            if found["event"] == "ready":
                self.port = int(found["url"].rpartition(":")[2])
                self._ready.set()
            elif found["event"] in ("failure", "library"):
                self.failures.append(line[:1500])
        self._ready.set()

    @property
    def rss(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss

    def __enter__(self) -> Self:
        self._listener.start()
        self._ready.wait(WAIT_S)
        assert self.port, "the server did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(WAIT_S)
        self._listener.join(WAIT_S)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.serve.malformed", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the time")
    options = parser.parse_args()
    numbers = range(options.start, options.start + options.cases)
    sizes: list[int] = []
    with tempfile.TemporaryDirectory() as folder, Server(write_speaker(Path(folder) / MODEL)) as server:

        def look(number: int) -> None:
            if (number - options.start) % max(1, options.cases // 10) == 0:
                sizes.append(server.rss)

        counts, faults = campaign(server.port, options.seed, numbers, look)
        sizes.append(server.rss)
    for line in [*faults[:20], *server.failures[:5]]:
        sys.stdout.write(f"{line}\n")
    for ending, count in sorted(counts.items()):
        sys.stdout.write(f"{count:6} {ending}\n")
    grown = sizes[-1] - sizes[len(sizes) // 2]
    sys.stdout.write(
        f"{options.cases} cases with seed {options.seed}: {len(faults)} faults, {len(server.failures)} failures, exit "
        f"code {server.process.returncode}, MB in memory {' '.join(f'{size / 1e6:.1f}' for size in sizes)}\n"
    )
    return int(bool(faults or server.failures or server.process.returncode or grown > MOST_GROWTH_BYTES))


if __name__ == "__main__":
    sys.exit(main())
