"""A server that is asked by Ray instead of a socket: requests come as ASGI's scopes, answers go as its messages."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any, NamedTuple

from starlette.types import Message

from pocketmoe.serve.server import ServeRequest, Serving

Told = tuple[str, Any]  # "message" and what ASGI would send, or "log" and a line


class Loaded(NamedTuple):
    """What is known once a model is loaded: how many requests are answered at once, the longest body, the log."""

    parallel: int
    body_bytes: int
    lines: list[str]


class Replica:
    """One model server. Ray makes it, in a process of its own on whatever machine it likes."""

    def __init__(self, request: ServeRequest) -> None:
        """Raises BadInput for bundles that cannot be used."""
        self._lines: list[str] = []
        self._serving = Serving(request, self._lines.append, listens=False)
        self._watching: list[asyncio.Future[None]] = []

    async def load(self) -> Loaded:
        """Load the first model. Raises what loading raises."""
        self._watching += map(asyncio.ensure_future, (self._serving.unload_when_idle(), self._serving.give_way()))
        async with self._serving.models.lease(next(iter(self._serving.request.bundles))):
            serving = self._serving
            return Loaded(serving.parallel, serving.service.body_limit_bytes, self._taken())

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Told]:
        """What the server sends for a request. Closed early, its client is gone, and the work ends within a step."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        gone = asyncio.Event()
        begun = False

        async def receive() -> Message:
            nonlocal begun
            if not begun:
                begun = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._serving.app(scope, receive, sent.put)
            finally:
                sent.put_nowait(None)

        running = asyncio.ensure_future(run())
        last: Message | None = None
        try:
            while (message := await sent.get()) is not None:
                if message["type"] == "http.response.body" and not message.get("more_body"):
                    last = message  # whoever has it may go, and would not hear of the log
                else:
                    yield "message", message
            await running
        finally:
            gone.set()
            with contextlib.suppress(Exception):
                await running
        for line in self._taken():  # of an answer that nobody waited for, with the next one
            yield "log", line
        if last:
            yield "message", last

    async def close(self) -> list[str]:
        """Give everything back; the last lines of the log."""
        for each in self._watching:
            each.cancel()
        await self._serving.close()
        return self._taken()

    def _taken(self) -> list[str]:
        lines = self._lines[:]
        del self._lines[: len(lines)]
        return lines
