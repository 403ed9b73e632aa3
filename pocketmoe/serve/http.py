"""Requests and answers between starlette and the rest: bodies within limits, clients that go away, event streams."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable, Mapping

from starlette.types import Message, Receive, Scope, Send

from pocketmoe.serve.api.errors import ApiError, Dialect

KEEP_ALIVE_S = 5.0  # between comments in a stream that has nothing to tell
STALL_S = 60.0  # that a client may take without reading anything
JSON = b"application/json"
_KEEP_ALIVE = b": keep-alive\n\n"


class ClientGone(Exception):
    """The client has closed its connection."""


def header(scope: Scope, name: bytes) -> str | None:
    """A header's value; of several the first."""
    found = next((value for key, value in scope["headers"] if key == name), None)
    return None if found is None else found.decode("latin-1")


def declared_bytes(scope: Scope, limit: int) -> int:
    """How long the body will be at most. Raises ApiError for one that is too long, compressed, or no JSON."""
    kind = (header(scope, b"content-type") or "").partition(";")[0].strip().lower()
    if kind != JSON.decode():
        raise ApiError(415, "send JSON, with the header Content-Type: application/json", code="unsupported_media_type")
    if (header(scope, b"content-encoding") or "identity").lower() != "identity":
        raise ApiError(415, "a compressed body is not supported", code="unsupported_media_type")
    length = header(scope, b"content-length")
    if length is None:
        return limit
    if int(length) > limit:  # digits, as the HTTP parser has made sure
        raise too_large(limit)
    return int(length)


def too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes", code="request_too_large")


async def read_body(receive: Receive, limit: int, timeout_s: float) -> bytes:
    """The whole body. Raises ApiError when it is too long or comes too slowly, ClientGone when it does not come."""
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body += message.get("body", b"")
                if len(body) > limit:
                    raise too_large(limit)
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {timeout_s:.0f} s", code="request_timeout") from error


async def while_connected(receive: Receive, work: Awaitable[None]) -> None:
    """Do the work as long as the client is there. Raises ClientGone once it goes, after the work has been ended."""
    doing = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({doing, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientGone
        await doing
    finally:
        for task in (doing, watching):
            task.cancel()
        await asyncio.gather(doing, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_json(send: Send, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
    await send(
        _start(status, {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})})
    )
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, error: ApiError, dialect: Dialect, headers: Mapping[str, str] | None = None) -> None:
    """Tell an error. What is left of the body is then read and dropped for a while: the client gets to see it."""
    more = dict(headers or {})
    if error.retry_after is not None:
        more["retry-after"] = str(error.retry_after)
    if error.status == 401:
        more["www-authenticate"] = "Bearer"
    await send_json(send, error.status, error.encoded(dialect), more)


async def send_events(
    send: Send, first: Iterable[bytes], events: AsyncIterator[bytes], headers: Mapping[str, str]
) -> None:
    """A stream of server-sent events, with a comment where nothing comes for some time."""
    head = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store", "x-accel-buffering": "no"}
    await send(_start(200, {**head, **headers}))
    for piece in first:
        await _send_piece(send, piece)
    async with contextlib.aclosing(_kept_alive(events)) as pieces:
        async for piece in pieces:
            await _send_piece(send, piece)
    await send({"type": "http.response.body", "body": b""})


async def _send_piece(send: Send, piece: bytes) -> None:
    try:
        async with asyncio.timeout(STALL_S):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    except TimeoutError as error:
        raise ClientGone from error


async def _kept_alive(events: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    pending: asyncio.Future[bytes] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(events))  # type: ignore[arg-type]
            done, _ = await asyncio.wait({pending}, timeout=KEEP_ALIVE_S)
            if not done:
                yield _KEEP_ALIVE
                continue
            try:
                piece = pending.result()
            except StopAsyncIteration:
                return
            pending = None
            yield piece
    finally:
        if pending is not None:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)


def _start(status: int, headers: Mapping[str, str]) -> Message:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": raw}
