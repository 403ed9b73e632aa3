"""An OpenAI-compatible server on loopback whose delays are known: it streams words, and remembers what it was asked."""

# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

import json
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Behaviour:
    """How it answers. `tokens_per_piece`: in one event, as servers that decode speculatively do."""

    first_s: float = 0.08
    step_s: float = 0.01
    usage: bool = True
    tokens_per_piece: int = 1
    fault: str = ""  # "401", "garbage", "break", "silent", "empty"
    asked: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    keys: list[str | None] = field(default_factory=list[str | None])
    most_at_once: int = 0
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def one_more(self) -> Generator[None]:
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            yield
        finally:
            with self._lock:
                self._now -= 1


class _Handler(BaseHTTPRequestHandler):
    behaviour: Behaviour

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        behaviour = self.behaviour
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        behaviour.asked.append(body | {"path": self.path})
        behaviour.keys.append(self.headers.get("Authorization"))
        if behaviour.fault == "401":
            refusal = f"no such key: {self.headers.get('Authorization')}".encode()
            self.send_response(401)
            self.send_header("Content-Length", str(len(refusal)))
            self.end_headers()
            self.wfile.write(refusal)
            return
        with behaviour.one_more():
            self._answer(behaviour, body)

    def _answer(self, behaviour: Behaviour, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        chat = self.path.endswith("chat/completions")
        if chat:
            self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})  # no text yet
        if behaviour.fault == "silent":
            time.sleep(5)
            return
        time.sleep(behaviour.first_s)
        pieces = 0 if behaviour.fault == "empty" else body["max_tokens"] // behaviour.tokens_per_piece
        for piece in range(pieces):
            if piece:
                time.sleep(behaviour.step_s)
            if behaviour.fault == "garbage":
                self.wfile.write(b"data: {half\n\n")
            if behaviour.fault == "break" and piece == 2:
                return
            self._event({"choices": [{"delta": {"content": "w "}} if chat else {"text": "w "}]})
        if behaviour.usage:
            used = {"prompt_tokens": 21, "completion_tokens": pieces * behaviour.tokens_per_piece}
            self._event({"choices": [], "usage": used})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()


@contextmanager
def serving(behaviour: Behaviour) -> Generator[str]:
    """The base address of a server that behaves so."""
    handler = type("Handler", (_Handler,), {"behaviour": behaviour})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
