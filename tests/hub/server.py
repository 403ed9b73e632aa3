"""A hub on 127.0.0.1 that can be written to: repositories with branches, who may do what, and ways to fail.

It answers huggingface_hub's client as the real one does, as far as that asks when it pulls and pushes.
"""

# pyright: reportArgumentType=false, reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

OWNER, READER = "hf_owner", "hf_reader"  # tokens
Files = dict[str, bytes]


@dataclass
class Repository:
    """Its branches, each the newest commit's files; and every commit."""

    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict[str, str])
    commits: dict[str, Files] = field(default_factory=dict[str, Files])

    def commit(self, files: Files, branch: str = "main") -> str:
        sha = hashlib.sha1(repr((sorted(files.items()), len(self.commits))).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def at(self, revision: str) -> str | None:
        """The commit of a branch or commit."""
        return self.branches.get(revision, revision if revision in self.commits else None)


class WritableHub(ThreadingHTTPServer):
    """`requests`: method, path and token of each. `cut`: of that file half is sent, and no more."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}  # large files that were uploaded, by SHA-256
        self.requests: list[tuple[str, str, str | None]] = []
        self.cut: str | None = None
        self.refused_uploads = 0  # how many more are refused
        self.ignored: set[str] = set()  # names that a .gitignore there keeps out
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def downloaded(self) -> set[str]:
        """The files whose content was asked for since the list was emptied."""
        return {
            path.partition("/resolve/")[2].partition("/")[2] for kind, path, _ in self.requests if kind == "GET"
        } - {""}

    def uploaded(self) -> list[str]:
        """SHA-256 of the large files that came since the list was emptied."""
        return [path.rpartition("/")[2] for kind, path, _ in self.requests if kind == "PUT"]

    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are part of the tests."""


class _Refused(Exception):
    def __init__(self, status: int, code: str | None = None, message: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    server: WritableHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        split = urlsplit(self.path)
        self.url_path, self.query = unquote(split.path), parse_qs(split.query)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.body = self.read_body()
        self.server.requests.append((self.command, self.url_path, self.token))
        try:
            for method, pattern, respond in _ROUTES:
                found = re.fullmatch(pattern, self.url_path)
                if found and self.command in method:
                    return respond(self, *found.groups())
            raise _Refused(404, "EntryNotFound")
        except _Refused as refused:
            return self.send(refused.status, json.dumps({"error": str(refused)}).encode(), code=refused.code)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(self, status: int, body: bytes, code: str | None = None, **headers: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode(), Content_Type="application/json")

    def readable(self, name: str) -> Repository:
        repository = self.server.repositories.get(name)
        if self.token not in (None, OWNER, READER):
            raise _Refused(401, None, "Invalid credentials in Authorization header")
        if repository is None or (repository.private and self.token is None):
            raise _Refused(404 if self.token else 401, "RepoNotFound")
        return repository

    def writable(self, name: str) -> Repository:
        if self.token is None:
            raise _Refused(401, None, "Invalid username or password.")
        repository = self.readable(name)
        if self.token != OWNER:
            raise _Refused(403, None, "You don't have the rights to write")
        return repository

    def commit_of(self, name: str, revision: str) -> tuple[Repository, str, Files]:
        repository = self.readable(name)
        commit = repository.at(revision)
        if commit is None:
            raise _Refused(404, "RevisionNotFound")
        return repository, commit, repository.commits[commit]

    def info(self, name: str, revision: str | None) -> None:
        repository, commit, _ = self.commit_of(name, revision or "main")
        told = {"id": name, "modelId": name, "sha": commit, "private": repository.private, "siblings": [], "tags": []}
        self.send_json(told)

    def tree(self, name: str, revision: str) -> None:
        _, _, files = self.commit_of(name, revision)
        self.send_json([_entry(path, files[path]) for path in sorted(files)])

    def file(self, name: str, revision: str, path: str) -> None:
        repository, commit, files = self.commit_of(name, revision)
        if repository.gated:
            raise _Refused(403, "GatedRepo")
        if path not in files:
            raise _Refused(404, "EntryNotFound")
        data, start = files[path], 0
        if found := re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range") or ""):
            start = int(found[1])
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        told = {"X_Repo_Commit": commit, "ETag": etag}
        if path == self.server.cut and self.command == "GET":
            self.send_response(206 if start else 200)
            for key, value in told.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start : max(start, len(data) // 2)])
            self.close_connection = True
            return
        if start:
            told["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send(206 if start else 200, data[start:], **told)

    def create(self) -> None:
        if self.token is None:
            raise _Refused(401, None, "Invalid username or password.")
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if self.token != OWNER or asked["organization"] != "me":
            raise _Refused(403, None, "You don't have the rights to create a model under this namespace")
        if name in self.server.repositories:
            raise _Refused(409, None, "You already created this model repo")
        private = asked.get("visibility") == "private" or asked.get("private") is True
        made = self.server.repositories[name] = Repository(private)
        made.commit({".gitattributes": b"*.bin filter=lfs\n*.onnx filter=lfs\n"})
        self.send_json({"url": f"{self.server.url}/{name}", "name": name})

    def branch(self, name: str, branch: str) -> None:
        repository = self.writable(name)
        if branch in repository.branches:
            raise _Refused(409, None, "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        self.send_json({})

    def preupload(self, name: str, revision: str) -> None:
        self.writable(name)
        files = json.loads(self.body)["files"]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".bin", ".onnx")) else "regular",
                "shouldIgnore": file["path"] in self.server.ignored,
            }
            for file in files
        ]
        self.send_json({"files": modes})

    def batch(self, name: str) -> None:
        self.writable(name)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            href = f"{self.server.url}/upload/{wanted['oid']}"
            known = wanted["oid"] in self.server.blobs
            objects.append({**wanted, **({} if known else {"actions": {"upload": {"href": href}}})})
        self.send_json({"transfer": "basic", "objects": objects})

    def upload(self, sha256: str) -> None:
        if self.server.refused_uploads:
            self.server.refused_uploads -= 1
            raise _Refused(400, None, "no")
        assert hashlib.sha256(self.body).hexdigest() == sha256
        self.server.blobs[sha256] = self.body
        self.send_json({})

    def commit(self, name: str, revision: str) -> None:
        repository = self.writable(name)
        before = repository.branches.get(revision)
        if before is None:
            raise _Refused(404, "RevisionNotFound")
        lines = [json.loads(line) for line in self.body.splitlines()]
        if lines[0]["value"].get("parentCommit", before) != before:
            raise _Refused(412, None, "A commit has happened since")
        files = dict(repository.commits[before])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            else:
                del files[value["path"]]
        sha = repository.commit(files, revision)
        url = f"{self.server.url}/{name}/commit/{sha}"
        self.send_json({"success": True, "commitOid": sha, "commitUrl": url})

    def validate(self) -> None:
        """The front matter as the hub judges it, as far as cards of ours could go wrong."""
        import yaml

        _, front, _ = json.loads(self.body)["content"].split("---\n", 2)
        data = yaml.safe_load(front)
        bases = data.get("base_model", [])
        for base in [bases] if isinstance(bases, str) else bases:
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
                raise _Refused(400, None, "base_model is no model")
        self.send_json({"errors": [], "warnings": []})


def _entry(path: str, data: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": oid}
    if path.endswith((".bin", ".onnx")):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


_REPO = r"([^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Any]] = [
    ("GET HEAD", rf"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.file),
    ("GET", rf"/api/models/{_REPO}/tree/(.+)", _Handler.tree),
    ("GET", rf"/api/models/{_REPO}(?:/revision/(.+))?", _Handler.info),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", rf"/api/models/{_REPO}/branch/(.+)", _Handler.branch),
    ("POST", rf"/api/models/{_REPO}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/api/models/{_REPO}/commit/(.+)", _Handler.commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/upload/([0-9a-f]{64})", _Handler.upload),
    ("POST", r"/api/validate-yaml", _Handler.validate),
]
