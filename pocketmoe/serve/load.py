"""How much is taken on at once: places for answers, a queue before them, room for the bodies of requests.

All of it belongs to the event loop's thread: nothing here is locked.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager

from pocketmoe.serve.api.errors import ApiError

RETRY_S = 5  # until a client may try again


class Room:
    """So many units, given out in the order in which they are asked for."""

    def __init__(self, size: int) -> None:
        self.size = self.free = size
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, units: int = 1) -> None:
        """Wait until there are so many; at most all of them."""
        if not self._waiting and units <= self.free:
            self.free -= units
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((units, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # given, and at the same time no longer wanted
                self.give(units)
            raise
        finally:
            self._next()

    def give(self, units: int = 1) -> None:
        """Give so many back."""
        self.free += units
        self._next()

    def _next(self) -> None:
        while self._waiting and (self._waiting[0][1].done() or self._waiting[0][0] <= self.free):
            units, turn = self._waiting.popleft()
            if not turn.done():
                self.free -= units
                turn.set_result(None)


class Admission:
    """Lets requests in: at most `parallel` that are answered and `queue` that wait; beyond that they are refused."""

    def __init__(self, parallel: int, queue: int, body_room_bytes: int) -> None:
        self.parallel, self.queue = parallel, queue
        self.places = Room(parallel)
        self._bodies = Room(body_room_bytes)
        self.inside = 0
        self.draining = False

    @property
    def running(self) -> int:
        return self.parallel - self.places.free

    @property
    def waiting(self) -> int:
        return max(0, self.inside - self.running)

    @contextmanager
    def ticket(self) -> Generator[None]:
        """Be one of those inside. Raises ApiError when there are too many, or the server is about to end."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=RETRY_S)
        if self.inside >= self.parallel + self.queue:
            raise ApiError(
                429,
                "the server is busy and its queue is full; try again later",
                code="queue_full",
                retry_after=RETRY_S,
            )
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    @asynccontextmanager
    async def body(self, nbytes: int) -> AsyncGenerator[None]:
        """Room for a request's body, until its text is no longer needed."""
        nbytes = min(nbytes, self._bodies.size)
        await self._bodies.take(nbytes)
        try:
            yield
        finally:
            self._bodies.give(nbytes)
