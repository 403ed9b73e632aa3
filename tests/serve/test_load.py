"""Too much at once, clients that go away, and the end: whatever happens, places come back and answers are right."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pocketmoe.serve import connections, http, service
from tests.hang import HANG_S
from tests.serve.client import Answer, Running, request_for, running
from tests.serve.gate import gate

PATH = "/v1/completions"
BODY = {"model": "small", "prompt": "a b c d", "max_tokens": 12}


@pytest.fixture(scope="module")
def narrow(small: Path) -> Iterator[Running]:
    """One place, and one that waits."""
    with running(request_for(small, parallel=1, queue=1)) as server:
        yield server


@pytest.fixture(scope="module")
def clients() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def ask(server: Running, clients: ThreadPoolExecutor, **fields: Any) -> Future[Answer]:
    return clients.submit(server.post, PATH, {**BODY, **fields})


def connect(server: Running, **fields: Any) -> socket.socket:
    """A client that has asked and is going to wait."""
    body = json.dumps({**BODY, **fields}).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=HANG_S)
    head = f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + body)
    return connection


def until(server: Running, **counts: int) -> None:
    """Wait until as many run and wait as should."""
    for _ in range(100_000):
        state = server.get("/pocketmoe/state").json
        if counts.items() <= state.items():
            return
    pytest.fail(f"never {counts}")


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    found = b""
    while mark not in found:
        piece = connection.recv(1 << 16)
        assert piece, found
        found += piece
    return found


def test_beyond_the_queue_requests_are_refused(narrow: Running, clients: ThreadPoolExecutor) -> None:
    """One runs, one waits, the third is told to come again; the two get their answers."""
    expected = narrow.post(PATH, BODY).json["choices"]
    with gate(narrow) as held:
        first = ask(narrow, clients)
        held.wait()
        second = ask(narrow, clients, prompt="b c")
        until(narrow, running=1, waiting=1)
        third = narrow.post(PATH, BODY)
        assert (third.status, third.json["error"]["code"]) == (429, "queue_full")
        assert int(third.headers["retry-after"]) > 0
        busy = narrow.post("/v1/messages", {**BODY})
        assert (busy.status, busy.json["error"]["type"]) == (429, "rate_limit_error")
    assert first.result().json["choices"] == expected
    assert second.result().json["choices"] == narrow.post(PATH, {**BODY, "prompt": "b c"}).json["choices"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_gives_its_place_back(
    narrow: Running, clients: ThreadPoolExecutor, stream: bool
) -> None:
    """In the middle of a step: after that step another is answered, and it is the right answer."""
    expected = narrow.post(PATH, BODY).json["choices"]
    with gate(narrow) as held:
        client = connect(narrow, stream=stream, max_tokens=50)
        held.wait()
        waiting = ask(narrow, clients)
        until(narrow, running=1, waiting=1)
        client.close()
        line = narrow.wait_for(gone=True)
        assert line.get("generated_tokens") is None
        assert not waiting.done()
    assert waiting.result().json["choices"] == expected
    until(narrow, running=0, waiting=0)


def test_a_client_that_has_asked_twice_and_goes_away_is_seen(narrow: Running, clients: ThreadPoolExecutor) -> None:
    """A request that came before the first one's answer does not hide that the client is gone; it may be answered."""
    with gate(narrow) as held:
        client = connect(narrow, max_tokens=50)
        held.wait()
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n")
        until(narrow, running=1)
        client.close()
        narrow.wait_for(gone=True)
    until(narrow, running=0, waiting=0)
    with contextlib.closing(connect(narrow)) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        assert read_until(client, b'{"status":"ok"}').count(b"HTTP/1.1 200") == 2


def test_what_comes_before_its_turn_is_bounded(narrow: Running) -> None:
    """Who sends on and on while it has no answer yet loses its connection."""
    with gate(narrow) as held, contextlib.closing(connect(narrow)) as client:
        held.wait()
        with contextlib.suppress(OSError):  # reset, or a broken pipe
            for _ in range(1_000_000):
                client.sendall(b"GET /health HTTP/1.1\r\n" * 1000)
            pytest.fail("it takes whatever comes")
        narrow.wait_for(gone=True)
    until(narrow, running=0, waiting=0)


def test_a_client_that_goes_away_while_it_waits_leaves_the_queue(narrow: Running, clients: ThreadPoolExecutor) -> None:
    """Its place in the queue is free at once, though nothing else has moved."""
    with gate(narrow) as held:
        first = ask(narrow, clients)
        held.wait()
        client = connect(narrow)
        until(narrow, running=1, waiting=1)
        client.close()
        narrow.wait_for(gone=True)
        until(narrow, running=1, waiting=0)
    assert first.result().status == 200


def test_something_is_sent_while_nothing_comes(narrow: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that waits for its model says so in comments, which keep connections open."""
    monkeypatch.setattr(http, "KEEP_ALIVE_S", 0.01)
    with gate(narrow), contextlib.closing(connect(narrow, stream=True)) as client:
        assert read_until(client, b": keep-alive\n\n").startswith(b"HTTP/1.1 200")


def test_time_is_limited(small: Path, clients: ThreadPoolExecutor) -> None:
    """Before the answer has begun it is an error, within a stream one of its events; the place comes back."""
    with running(request_for(small, parallel=1, timeout_s=0.3)) as server, gate(server) as held:
        late = ask(server, clients)
        held.wait()
        found = late.result()
        assert (found.status, found.json["error"]["code"]) == (504, "timeout")
        held.open()
        until(server, running=0, waiting=0)


def test_slow_clients_are_not_waited_for(narrow: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that never sends its headers, or never its body."""
    monkeypatch.setattr(connections, "HEADERS_S", 0.05)
    monkeypatch.setattr(service, "BODY_S", 0.05)
    assert narrow.raw(b"GET / HT", end=False) == b""
    assert narrow.raw(b"", end=False) == b""
    head = f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{{"
    assert narrow.raw(head.encode(), end=False).startswith(b"HTTP/1.1 408")
    until(narrow, running=0, waiting=0)


def test_connections_are_counted(small: Path) -> None:
    """Beyond the limit a connection is told so and closed; one that ends makes room."""
    with running(request_for(small, connections=2)) as server:
        others = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        try:
            found = server.raw(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n", end=False)
            assert found.startswith(b"HTTP/1.1 503")
            assert b"too many connections" in found
        finally:
            for other in others:
                other.close()
        while not server.raw(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").startswith(
            b"HTTP/1.1 200"
        ):
            pass


def test_the_end_waits_for_answers(small: Path, clients: ThreadPoolExecutor) -> None:
    """What runs and what waits is answered whole; whoever comes then is refused."""
    with running(request_for(small, parallel=1)) as server:
        expected = server.post(PATH, BODY).json["choices"]
        kept = socket.create_connection(("127.0.0.1", server.port))
        with gate(server) as held:
            first = ask(server, clients)
            held.wait()
            second = ask(server, clients)
            until(server, running=1, waiting=1)
            server.serving.server.stop()
            server.serving.log.event("asked to stop")
            held.open()
        assert first.result().json["choices"] == second.result().json["choices"] == expected
        kept.close()
    with pytest.raises(OSError):  # noqa: PT011 - refused, or reset
        server.get("/health")


def test_many_at_once_get_their_own_answers(small: Path, clients: ThreadPoolExecutor) -> None:
    """Several places, streamed and not, with clients that vanish: every answer is that of a fresh run."""
    with running(request_for(small, parallel=3, queue=64)) as server:
        prompts = [
            " ".join("abcdefgh"[(i * step) % 8] for i in range(1, 3 + i % 30)) for step in (1, 3, 5) for i in range(8)
        ]
        asked = [{"prompt": prompt, "temperature": i % 2, "seed": i} for i, prompt in enumerate(prompts)]
        alone = [server.post(PATH, {**BODY, **fields}).json["choices"] for fields in asked]
        gone = [connect(server, stream=bool(i % 2), **fields) for i, fields in enumerate(asked[:6])]
        together = [ask(server, clients, **fields) for fields in asked]
        for client in gone:
            client.close()
        assert [each.result().json["choices"] for each in together] == alone
        until(server, running=0, waiting=0)
        assert not [line for line in server.lines if line["event"] == "failure"]


def test_logs_hold_no_text(small: Path) -> None:
    """A line a request, with counts and times; what was said only where that was asked for."""
    for log_text in (False, True):
        with running(request_for(small, log_text=log_text)) as server:
            answer = server.post(PATH, {**BODY, "prompt": "h g f e"})
            line = server.wait_for(event="request", path=PATH)
            assert line["id"] == answer.headers["x-request-id"]
            assert (line["status"], line["prompt_tokens"], line["generated_tokens"]) == (200, 4, 12)
            assert ("h g f e" in json.dumps(line)) == log_text
            assert (answer.json["choices"][0]["text"] in json.dumps(line)) == log_text
