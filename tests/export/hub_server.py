"""What of the Hugging Face hub huggingface_hub talks to, on 127.0.0.1: one model, and the ways in which it can fail."""

# pyright: reportArgumentType=false, reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = "someone/tiny-moe"
_REFUSALS = {
    "someone/gated": (403, "GatedRepo"),
    "someone/private": (401, "RepoNotFound"),
    "someone/unknown": (404, "RepoNotFound"),
    "someone/down": (503, None),
}


class Hub(ThreadingHTTPServer):
    """Serves the files of `directory` as MODEL; `requests` are the paths asked for, with the range if there was one."""

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.directory = directory
        self.cut: str | None = None  # the name of a file of which every answer ends after its first half
        self.requests: list[tuple[str, str, str | None]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        repo = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2])
        if repo in _REFUSALS:
            return self.refuse(*_REFUSALS[repo])
        if repo != MODEL:
            return self.refuse(404, "RepoNotFound")
        if found := re.fullmatch(rf"/api/models/{MODEL}(?:/revision/(.+))?", path):
            if found[1] not in (None, "main", "v1", COMMIT):
                return self.refuse(404, "RevisionNotFound")
            return self.send_json({"id": MODEL, "modelId": MODEL, "sha": COMMIT, "siblings": [], "tags": []})
        if path.startswith(f"/api/models/{MODEL}/tree/"):
            return self.send_json([_entry(file, self.server.directory) for file in self.files()])
        found = re.fullmatch(rf"/{MODEL}/resolve/[^/]+/(.+)", path)
        if found and (file := self.server.directory / found[1]).is_file():
            return self.send_file(file, with_body)
        return self.refuse(404, "EntryNotFound")

    def files(self) -> list[Path]:
        return sorted(path for path in self.server.directory.rglob("*") if path.is_file())

    def refuse(self, status: int, code: str | None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, file: Path, with_body: bool) -> None:
        data, start = file.read_bytes(), 0
        if found := re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range") or ""):
            start = int(found[1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if with_body and file.name == self.server.cut:
            self.wfile.write(data[start : max(start, len(data) // 2)])
            self.close_connection = True
        elif with_body:
            self.wfile.write(data[start:])


def _entry(file: Path, root: Path) -> dict[str, Any]:
    data = file.read_bytes()
    entry = {"type": "file", "path": file.relative_to(root).as_posix(), "size": len(data)}
    entry["oid"] = hashlib.sha1(data, usedforsecurity=False).hexdigest()
    if file.suffix == ".safetensors":
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry
