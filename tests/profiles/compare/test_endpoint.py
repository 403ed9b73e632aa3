"""Measuring an OpenAI-compatible server, against a real one on loopback whose delays are known."""

# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from pocketmoe.errors import BadInput
from pocketmoe.profiles.compare.deadline import Deadline
from pocketmoe.profiles.compare.endpoint import EndpointError, LoadTest, Target, all_or_none, measure
from tests.hang import HANG_S
from tests.profiles.completions_server import Behaviour, serving

PLAN = LoadTest(prompt_tokens=20, output_tokens=16, users=(1, 4), requests=4)
KEY = "sk-very-secret"


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_the_delays_of_the_server_are_what_is_measured(api: str) -> None:
    """First token, rate per user and throughput are those that the server's own sleeping makes, or a little less.

    What else runs here adds to the delays and never takes from them: one attempt of many has to come near.
    """
    answer_s = 0.08 + 15 * 0.02
    for _ in range(30):
        behaviour = Behaviour(first_s=0.08, step_s=0.02)
        with serving(behaviour) as url:
            found = measure(Target(url, "m", api, KEY), PLAN, "2026-11-24T00:00:00+00:00")
        for level in found.levels:
            assert level.ttft_median_s >= 0.08
            assert level.tokens_per_s_per_user <= 50
            assert level.tokens_per_s <= level.users * 16 / answer_s
        if all(
            level.ttft_median_s < 0.13
            and level.tokens_per_s_per_user > 50 * 0.75
            and level.tokens_per_s > 0.75 * level.users * 16 / answer_s
            for level in found.levels
        ):
            break
    else:
        pytest.fail(f"never near the server's own delays: {found.levels}")
    assert [level.users for level in found.levels] == [1, 4]
    assert {(level.prompt_tokens, level.output_tokens) for level in found.levels} == {(21, 16)}
    assert behaviour.most_at_once == 4
    assert {request["path"] for request in behaviour.asked} == {f"/v1/{'chat/' * (api == 'chat')}completions"}
    assert len(behaviour.asked) == 1 + 4 + 4
    assert {*behaviour.keys} == {f"Bearer {KEY}"}
    assert KEY not in repr(found)


def test_prompts_differ_and_have_about_the_length_asked_for() -> None:
    """No server can answer from its cache of prompts; a word is about a token."""
    behaviour = Behaviour(first_s=0, step_s=0.001)
    with serving(behaviour) as url:
        measure(Target(f"{url}/v1/", "m"), PLAN, "")
    prompts = [request["prompt"] for request in behaviour.asked]
    assert len({prompt[:12] for prompt in prompts}) == len(prompts)
    assert all(abs(len(prompt.split()) - 20) <= 2 for prompt in prompts)
    assert all(request["max_tokens"] == 16 and request["stream"] for request in behaviour.asked)


def test_tokens_are_counted_by_the_server_where_it_counts() -> None:
    """Pieces of two tokens are two tokens when the server says so, and one, with a note, when it does not."""
    with serving(Behaviour(step_s=0.01, tokens_per_piece=2)) as url:
        told = measure(Target(url, "m"), PLAN, "")
    with serving(Behaviour(step_s=0.01, tokens_per_piece=2, usage=False)) as url:
        untold = measure(Target(url, "m"), PLAN, "")
    assert (told.counted_by, told.levels[0].output_tokens) == ("server", 16)
    assert (untold.counted_by, untold.levels[0].output_tokens) == ("pieces", 8)
    assert any("does not count" in note for note in untold.notes)
    assert any("16 were asked for" in note for note in untold.notes)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("401", "401"),
        ("garbage", "not JSON"),
        ("break", "broke off"),
        ("silent", "timed out"),
        ("empty", "no text"),
    ],
)
def test_a_server_that_fails_is_an_error_of_one_line_without_the_key(fault: str, words: str) -> None:
    """Refusals, garbage, an early end, silence and empty answers are told apart; what is said never holds the key."""
    with serving(Behaviour(first_s=0, step_s=0.001, fault=fault)) as url, pytest.raises(EndpointError) as caught:
        measure(Target(url, "m", key=KEY, timeout_s=0.5), PLAN, "")
    assert words in caught.value.one_line()
    assert KEY not in caught.value.one_line()
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://127.0.0.1:1", "not the address"),
        ("127.0.0.1:8000", "not the address"),
        ("http://127.0.0.1:99999", "not the address"),
        ("http://user:secret@127.0.0.1:1", "password"),
        ("http://example.invalid:1", "unencrypted"),
        ("http://127.0.0.1:9", "cannot be measured"),
        ("http://[", "not the address"),
        ("http://[::1", "not the address"),
        ("http://localhost/é", "not the address"),
        ("http://localhost/a b", "not the address"),
        ("http://localhost\0:1", "not the address"),
        ("https://a..b", "cannot be measured"),
    ],
)
def test_addresses_that_cannot_be_measured_are_refused(url: str, words: str) -> None:
    """Nothing is sent to what is no address, and a key never goes over the network in the clear."""
    with pytest.raises(BadInput) as caught:
        measure(Target(url, "m", key=KEY, timeout_s=2), PLAN, "")
    assert words in caught.value.one_line()
    assert "secret" not in caught.value.one_line()


def test_the_number_of_requests_is_bounded() -> None:
    """More requests than the plan allows are refused before the first."""
    with pytest.raises(BadInput, match="401 requests"):
        measure(Target("http://127.0.0.1:9", "m"), LoadTest(20, 16, users=(200, 200)), "")


DRIPS = {
    "status line": (b"", b"H"),
    "header": (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    "100 Continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "body of an error": (b"HTTP/1.1 500 No\r\nContent-Length: 299\r\n\r\n", b"x"),
    "line of the stream": (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
    "comments": (b"HTTP/1.1 200 OK\r\n\r\n", b": still there\n"),
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
}


@contextmanager
def dripping(first: bytes, then: bytes) -> Generator[int]:
    """The port of a server that says something, and then a little for ever; it never waits to be asked."""
    stop = threading.Event()

    def talk(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.sendall(first)
            while not stop.wait(0.02):
                connection.sendall(then)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=talk, args=(server.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        stop.set()
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.mark.parametrize("drip", DRIPS)
def test_no_server_keeps_us_beyond_the_deadline(drip: str) -> None:
    """Wherever a server drips, ten timeouts after the request began it is over; that is what ends it, nothing else."""
    with dripping(*DRIPS[drip]) as port, pytest.raises(EndpointError, match="takes too long"):
        measure(Target(f"http://127.0.0.1:{port}", "m", timeout_s=0.1), PLAN, "")


def test_a_handshake_without_end_is_bounded_too() -> None:
    """Bytes of a TLS record that never ends: one timeout is for the whole handshake."""
    with dripping(b"\x16\x03\x03\x40\x00", b"\x02") as port, pytest.raises(EndpointError, match="timed out"):
        measure(Target(f"https://127.0.0.1:{port}", "m", timeout_s=0.3), PLAN, "")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\ndata: " + b"[" * 100_000 + b"\n", "not JSON"),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: " + b"9" * 10_000 + b"\n", "not JSON"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nx", "cannot be measured"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nx", "broke off"),
        (b"HTTP/1.1 -5 OK\r\n\r\n", "cannot be measured"),
        (b"\x00" * 100_000, "cannot be measured"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200, "cannot be measured"),
    ],
    ids=range(7),
)
def test_what_is_no_answer_is_one_line(said: bytes, words: str) -> None:
    """Nesting, digits without end, chunks of length -5 and other rubbish."""
    with dripping(said, b"") as port, pytest.raises(EndpointError) as caught:
        measure(Target(f"http://127.0.0.1:{port}", "m", timeout_s=0.3), PLAN, "")
    assert words in caught.value.one_line()


def test_a_request_that_fails_ends_the_others() -> None:
    """When one of several at once is refused, those that would last are not waited for."""
    asking: set[Deadline] = set()
    with dripping(b"", b"") as port, ThreadPoolExecutor(1) as pool:
        deadline = Deadline(600, 600).__enter__()
        asking.add(deadline)
        connection = deadline.connect("127.0.0.1", port, None)
        waiting = pool.submit(connection.recv, 1)
        with pytest.raises(KeyboardInterrupt), all_or_none(pool, asking):
            raise KeyboardInterrupt
        assert waiting.result(timeout=HANG_S) == b""
        connection.close()
        deadline.__exit__()
