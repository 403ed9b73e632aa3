"""The command itself: a process, in a memory cgroup of its budget, with clients, until it is told to end."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.cgroup import run_limited
from tests.hang import HANG_S

COMMAND = [sys.executable, "-m", "pocketmoe", "serve"]


def post(port: int, body: dict[str, Any]) -> tuple[int, Any]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=HANG_S)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())


class Process:
    """A server in a process of its own."""

    def __init__(self, root: Path) -> None:
        self.child = subprocess.Popen(
            [*COMMAND, str(root), "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.child.stderr is not None
        self.lines: list[str] = []
        for line in self.child.stderr:
            self.lines.append(line)
            if found := re.match(r"Serving small at http://127\.0\.0\.1:(\d+)/v1", line):
                self.port = int(found[1])
                break
        else:
            pytest.fail("".join(self.lines))

    def end(self) -> tuple[int, str]:
        out, err = self.child.communicate(timeout=HANG_S)
        assert out == ""
        return self.child.returncode, err


@pytest.fixture
def process(small: Path) -> Iterator[Process]:
    process = Process(small)
    yield process
    process.child.kill()
    process.child.wait()
    for pipe in (process.child.stdout, process.child.stderr):
        if pipe:
            pipe.close()


def unfinished(port: int) -> socket.socket:
    """A client whose request is on its way for ever."""
    client = socket.create_connection(("127.0.0.1", port), timeout=HANG_S)
    client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n")
    client.sendall(b"content-length: 9\r\nexpect: 100-continue\r\n\r\n")
    assert client.recv(100).startswith(b"HTTP/1.1 100")  # it is being read
    return client


def test_a_signal_ends_it_when_all_are_answered(process: Process) -> None:
    """Exit code 0; whoever is in the middle of a request gets its answer."""
    status, answer = post(process.port, {"model": "small", "prompt": "a b c", "max_tokens": 4})
    assert (status, answer["usage"]["completion_tokens"]) == (200, 4)
    with unfinished(process.port) as client:
        process.child.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.child.wait(0.5)
        client.sendall(b'{"a": 1}.')
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 400")
    code, err = process.end()
    assert code == 0, err
    assert "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(process: Process, number: signal.Signals) -> None:
    """With the exit code of that signal, and nobody waits for a request that never comes."""
    with unfinished(process.port):
        process.child.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.child.wait(0.5)
        process.child.send_signal(number)
        code, err = process.end()
    assert code == (143 if number == signal.SIGTERM else 130), err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nothing"], 3, "nothing"),
        ([], 2, "Missing argument"),
        (["small", "small"], 2, "give each a --name"),
        (["small", "--name", "a", "--name", "b"], 2, "1 bundles and 2 names"),
        (["small", "--name", "a b"], 2, "no name for a model"),
        (["small", "--host", "0.0.0.0"], 2, "--api-key-file"),
        (["small", "--host", "203.0.113.9", "--api-key-file", "key"], 3, "cannot be listened on"),
        (["small", "--api-key-file", "short"], 3, "at least 16"),
        (["small", "--cors", "*"], 2, "not an origin"),
        (["small", "--cors", "https://a.example/path"], 2, "not an origin"),
        (["small", "--idle-unload", "soon"], 2, "90s, 10m or 2h"),
        (["small", "--memory", "20MB"], 4, "The least that would do"),
        (["small", "--context", "65"], 3, "context of 64"),
    ],
)
def test_what_cannot_be_served_is_a_line(
    small: Path, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    """The right exit code, one line, no traceback, and no port left open."""
    (tmp_path / "key").write_text("k" * 20 + "\n")
    (tmp_path / "short").write_text("short\n")
    (tmp_path / "small").symlink_to(small)
    environment = {name: value for name, value in os.environ.items() if name != "POCKETMOE_API_KEY"}
    done = subprocess.run(
        [*COMMAND, *arguments, "--port", "0"], cwd=tmp_path, env={**environment, "PYTHONPATH": str(Path.cwd())},
        capture_output=True, text=True, check=False, timeout=HANG_S,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_the_budget_holds_under_load(small: Path) -> None:
    """In a memory cgroup of the least budget it lives, whatever is asked; its answers are the same at the end."""
    least = subprocess.run(
        [*COMMAND, str(small), "--memory", "20MB"], capture_output=True, text=True, check=False, timeout=HANG_S
    )
    found = re.search(r"--memory (\d+)MB", least.stderr)
    assert found, least.stderr
    limit = int(found[1])
    ready, port, pid = threading.Event(), 0, 0

    def on_line(line: str) -> None:
        nonlocal port, pid
        if '"event": "ready"' in line:
            told = json.loads(line)
            port, pid = int(told["url"].rpartition(":")[2]), told["pid"]
            ready.set()

    with ThreadPoolExecutor(6) as pool:
        command = [*COMMAND, str(small), "--port", "0", "--memory", f"{limit}MB"]
        served = pool.submit(run_limited, command, limit * 10**6, None, on_line)
        while not ready.wait(0.1):
            assert not served.done(), served.result()
        asked = [
            {"model": "small", "prompt": [(number * step) % 8 for step in range(1, 50 - number)], "max_tokens": 12}
            for number in range(12)
        ]
        first = list(pool.map(lambda body: post(port, body), asked[:5] * 2 + asked[5:]))
        post(port, {"model": "small", "prompt": "a " * 100_000})
        again = [post(port, body) for body in asked[:5]]
        os.kill(pid, signal.SIGTERM)
        ended = served.result()
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.peak_bytes is not None
    assert ended.peak_bytes <= limit * 10**6
    assert {status for status, _ in [*first, *again]} == {200}
    texts = [[answer["choices"] for _, answer in answers] for answers in (first[:5], first[5:10], again)]
    assert texts[0] == texts[1] == texts[2]


def healthy(host: str, port: int) -> bool:
    with (
        contextlib.suppress(ConnectionError, http.client.RemoteDisconnected),
        contextlib.closing(http.client.HTTPConnection(host, port, timeout=HANG_S)) as connection,
    ):
        connection.request("GET", "/health", headers={"Host": "localhost"})
        return connection.getresponse().status == 200
    return False


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_few_open_files_are_enough_or_said(small: Path, host: str) -> None:
    """With 64 of them, on either kind of address, it serves; clients beyond them are told so, and later served."""
    script = 'ulimit -n 64; exec "$@"'
    command = ["bash", "-c", script, "bash", *COMMAND, str(small), "--port", "0", "--host", host]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr
        try:
            found = next((match for line in child.stderr if (match := re.search(r"Serving .*:(\d+)/v1", line))), None)
            assert found
            address = (host, int(found[1]))
            crowd = [socket.create_connection(address, timeout=HANG_S) for _ in range(80)]
            assert crowd[-1].recv(100).startswith(b"HTTP/1.1 503")
            for client in crowd:
                client.close()
            while not healthy(*address):  # until it has seen that they are gone
                pass
        finally:
            child.send_signal(signal.SIGTERM)
            lines = child.stderr.read()
        assert child.wait(HANG_S) == 0, lines
    assert "Traceback" not in lines, lines
    assert "too_many_connections" in lines


def test_two_servers_share_a_bundle_and_not_a_port(small: Path, process: Process) -> None:
    """A second one of the same bundle gives the same answers; one on a port that is taken says so in a line."""
    body = {"model": "small", "prompt": "a b c", "max_tokens": 4}
    other = Process(small)
    try:
        assert post(process.port, body)[1]["choices"] == post(other.port, body)[1]["choices"]
        taken = subprocess.run(
            [*COMMAND, str(small), "--port", str(other.port)],
            capture_output=True, text=True, check=False, timeout=HANG_S,
        )  # fmt: skip
        assert taken.returncode == 3
        assert "cannot be listened on" in taken.stderr.splitlines()[-1]
    finally:
        other.child.send_signal(signal.SIGTERM)
        assert other.end()[0] == 0
