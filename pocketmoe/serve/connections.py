"""Connections within limits: how many, how large their headers, how long a request may take to begin.

uvicorn's own limits begin once a request is complete; a client that connects and says nothing would stay for ever.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from pocketmoe.serve.api.errors import ApiError

HEADERS_BYTES = 32 << 10
ACCEPTED_AT_ONCE = 4  # of connections; one that is refused is closed two turns of the event loop later
FILES_LEFT = 24  # that may be opened beside connections, and for those that are about to be refused
HEADERS_S = 10.0  # that a request's headers may take to arrive
_BUSY = ApiError(503, "too many connections; try again later", code="too_many_connections")


def _is_nearly_last(transport: asyncio.Transport) -> bool:
    """Whether hardly any more files can be opened: a new one has the lowest number that is free."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limit != resource.RLIM_INFINITY and transport.get_extra_info("socket").fileno() >= limit - FILES_LEFT


def _answer(error: ApiError, more: bytes = b"") -> bytes:
    """A whole response, to one that has not become a request."""
    body = error.encoded("openai")
    head = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n".encode()
    return head + more + b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


class LimitedProtocol(H11Protocol):
    """One connection."""

    def __init__(self, *args: Any, most_connections: int, refused: Callable[[ApiError], None], **options: Any) -> None:
        """`refused`: told of what never becomes a request."""
        super().__init__(*args, **options)
        self._most, self._refused = most_connections, refused
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort}  # of which each request gets a copy
        if len(self.connections) > self._most or _is_nearly_last(transport):
            transport.write(_answer(_BUSY, b"retry-after: 5\r\n"))
            transport.close()
            self._refused(_BUSY)
        else:
            self._expect_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._go_on_reading()
        if self._is_idle():
            self._expect_headers()
        else:
            self._headers_came()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_came()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Where an answer has begun already, the connection just ends."""
        if self._is_idle():
            error = ApiError(400, msg, code="invalid_http")
            self.transport.write(_answer(error))
            self._refused(error)
        self.transport.close()

    def _go_on_reading(self) -> None:
        """A request that comes before the last one is answered waits, and uvicorn stops reading: then a client that
        goes away would not be seen. So reading goes on, up to as much as headers may be."""
        waiting, _ = self.conn.trailing_data
        if len(waiting) > HEADERS_BYTES and not self._is_idle():
            self.transport.abort()
        elif waiting:
            self.flow.resume_reading()

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete  # pyright: ignore[reportUnnecessaryComparison]

    def _expect_headers(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(HEADERS_S, self.transport.abort)

    def _headers_came(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
