"""Who may talk to the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pocketmoe.serve.guard import host_name, is_loopback
from tests.serve.client import Running, request_for, running

KEY, OTHER = "k" * 20, "another key of ours"


@pytest.fixture(scope="module")
def guarded(small: Path) -> Iterator[Running]:
    request = request_for(small, keys=(KEY, OTHER), names=("Box.example",), origins=("https://chat.example",))
    with running(request) as server:
        yield server


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("localhost", True),
        ("localhost:8080", True),
        ("LOCALHOST.", True),
        ("127.0.0.1:99", True),
        ("192.168.1.7:8080", True),
        ("[::1]:8080", True),
        ("[::1]", True),
        ("box.example", True),
        ("BOX.EXAMPLE:443", True),
        ("evil.example", False),
        ("localhost.evil.example:8080", False),
        ("127.0.0.1.evil.example", False),
        ("box.example.evil", False),
        ("localhost:notaport", False),
        ("localhost:99999", False),
        ("localhost@evil.example", False),
        ("localhost/evil", False),
        ("localhost evil", False),
        ("[::1", False),
        ("", False),
    ],
)
def test_only_known_hosts(guarded: Running, host: str, known: bool) -> None:
    """A name that an attacker points at this machine is refused; an address cannot be pointed anywhere."""
    found = guarded.raw(f"GET /health HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
    assert found.split(b" ")[1] == (b"200" if known else b"403")


def test_two_hosts_or_none_are_refused(guarded: Running) -> None:
    """Which of them would a proxy have believed?"""
    assert guarded.raw(b"GET /health HTTP/1.0\r\n\r\n").split(b" ")[1] == b"403"
    both = b"GET /health HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\n\r\n"
    assert guarded.raw(both).split(b" ")[1] in (b"400", b"403")


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        (None, True),
        ("https://chat.example", True),
        ("http://chat.example", False),
        ("https://evil.example", False),
        ("https://chat.example.evil", False),
        ("null", False),
        ("", False),
    ],
)
def test_only_pages_that_are_named(guarded: Running, origin: str | None, allowed: bool) -> None:
    """Pages of this server itself, and those of --cors, which are told so; no other, not even without a key."""
    headers = {"origin": origin} if origin is not None else {}
    found = guarded.get("/health", **headers)
    assert found.status == (200 if allowed else 403)
    assert found.headers.get("access-control-allow-origin") == (origin if allowed else None)
    own = f"http://127.0.0.1:{guarded.port}"
    assert guarded.get("/health", origin=own).status == 200
    assert guarded.get("/health", origin=f"{own}1").status == 403


def test_preflights(guarded: Running, server: Running) -> None:
    """A browser asks first: yes for the page that is named, no for others, and no at all where none is."""
    asks = {"origin": "https://chat.example", "access-control-request-method": "POST"}
    asks["access-control-request-headers"] = "authorization,content-type"
    allowed = guarded.send("OPTIONS", "/v1/chat/completions", None, asks)
    assert allowed.status == 200
    assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
    refused = guarded.send("OPTIONS", "/v1/chat/completions", None, {**asks, "origin": "https://evil.example"})
    assert "access-control-allow-origin" not in refused.headers
    assert "access-control-allow-origin" not in server.send("OPTIONS", "/v1/models", None, asks).headers


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/pocketmoe/state", "/v1/chat/completions", "/nothing"])
def test_everything_but_health_needs_a_key(guarded: Running, path: str) -> None:
    """Either of the keys, in either header."""
    for headers in (
        {},
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": KEY},
        {"authorization": "Bearer "},
        {"authorization": f"Basic {KEY}"},
        {"x-api-key": KEY[:-1]},
        {"x-api-key": ""},
        {"authorization": "Bearer wrong", "x-api-key": KEY},
    ):
        found = guarded.send("GET", path, None, headers)
        assert found.status == 401, headers
        assert found.json["error"]["type"] == "authentication_error"
        assert "www-authenticate" in found.headers
    for headers in ({"authorization": f"Bearer {KEY}"}, {"authorization": f"bearer {OTHER}"}, {"x-api-key": OTHER}):
        assert guarded.send("GET", path, None, headers).status in (200, 404, 405)
    for open_path in ("/", "/health", "/ready"):
        assert guarded.get(open_path).status == 200


def test_addresses_that_others_reach() -> None:
    """Only loopback needs no key."""
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "example.org", "")))
    assert host_name("[fe80::1]:80") == "fe80::1"
