"""Connections within limits: how many, how large their headers, how long a request may take to begin.

uvicorn's own limits begin once a request is complete; a client that connects and says nothing would stay for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from pocketmoe.serve.api.errors import ApiError

HEADERS_BYTES = 32 << 10
HEADERS_S = 10.0  # that a request's headers may take to arrive
_BUSY = ApiError(503, "too many connections; try again later", code="too_many_connections").encoded("openai")
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close\r\nretry-after: 5\r\n"
    b"content-length: %d\r\n\r\n%b" % (len(_BUSY), _BUSY)
)


class LimitedProtocol(H11Protocol):
    """One connection."""

    def __init__(self, *args: Any, most_connections: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self._most = most_connections
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort}  # of which each request gets a copy
        if len(self.connections) > self._most:
            transport.write(_FULL)
            transport.close()
        else:
            self._expect_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_idle():
            self._expect_headers()
        else:
            self._headers_came()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_came()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Where an answer has begun already, the connection just ends."""
        with contextlib.suppress(Exception):
            super().send_400_response(msg)
        self.transport.close()

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete  # pyright: ignore[reportUnnecessaryComparison]

    def _expect_headers(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(HEADERS_S, self.transport.abort)

    def _headers_came(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
