"""The models that are served, of which one is loaded at a time, so that it has the whole budget.

Requests for the loaded model share it. One for another model waits until those before it are answered; then the models
are exchanged, and requests that came later wait their turn: no model waits for ever. All but loading and closing
happens in the event loop's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from pocketmoe.runtime.model import Model
from pocketmoe.serve.api.errors import ApiError

Load = Callable[[str], Model]


@dataclass(frozen=True)
class Served:
    """What is known of a bundle without loading it."""

    path: Path
    context: int  # tokens of the longest text
    chats: bool  # it has a chat template


class Models:
    """Bundles by the name under which they are asked for."""

    def __init__(self, bundles: Mapping[str, Served], load: Load, threads: Executor) -> None:
        """`load` opens a bundle; it is called in one of `threads`."""
        self.bundles = dict(bundles)
        self.created = int(time.time())
        self.loaded: Model | None = None
        self.loaded_name: str | None = None
        self.loading: str | None = None
        self.ever_loaded = False
        self.leases = 0
        self.last_used = time.monotonic()
        self._load, self._threads = load, threads
        self._waiting: deque[tuple[str, asyncio.Future[Model]]] = deque()
        self._changing: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def lease(self, name: str) -> AsyncGenerator[Model]:
        """A model, loaded, that stays so as long as it is held. Raises ApiError for a name that is not served, and what
        loading raises."""
        model = await self._take(name)
        try:
            yield model
        finally:
            self.leases -= 1
            self.last_used = time.monotonic()
            self._next()

    @property
    def idle_s(self) -> float | None:
        """For how long the loaded model has not been used; None where it is, or there is none."""
        if not self.loaded or self.leases or self._changing:
            return None
        return time.monotonic() - self.last_used

    async def unload(self) -> None:
        """Give the memory of the model back that nobody uses; another request loads it again."""
        if self.loaded and not self.leases and not self._changing:
            self._begin_change(None)
            await self.settled()

    async def settled(self) -> None:
        """Wait until no model is being loaded or closed."""
        while self._changing:
            await asyncio.wait([self._changing])

    async def _take(self, name: str) -> Model:
        if name not in self.bundles:
            raise ApiError(404, f"the model '{name}' does not exist here", "model", "model_not_found")
        turn: asyncio.Future[Model] = asyncio.get_running_loop().create_future()
        self._waiting.append((name, turn))
        self._next()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and not turn.exception():
                self.leases -= 1
            raise
        finally:
            self._next()

    def _next(self) -> None:
        """Serve those that wait, as far as the loaded model is theirs, and begin the change that the next one wants."""
        while self._waiting and not self._changing:
            name, turn = self._waiting[0]
            if turn.done():
                self._waiting.popleft()
            elif name == self.loaded_name and self.loaded:
                self._waiting.popleft()
                self.leases += 1
                turn.set_result(self.loaded)
            elif self.leases:
                return
            else:
                self._begin_change(name)

    def _begin_change(self, name: str | None) -> None:
        self._changing = asyncio.get_running_loop().create_task(self._change(name))

    async def _change(self, name: str | None) -> None:
        loop = asyncio.get_running_loop()
        before, self.loaded, self.loaded_name, self.loading = self.loaded, None, None, name
        try:
            if before:
                await loop.run_in_executor(self._threads, before.close)
                del before
            if name is not None:
                self.loaded = await loop.run_in_executor(self._threads, self._load, name)
                self.loaded_name, self.ever_loaded = name, True
        except Exception as error:  # noqa: BLE001 - told to those who asked for the model
            for waiting, turn in self._waiting:
                if waiting == name and not turn.done():
                    turn.set_exception(error)
        finally:
            self.loading, self._changing = None, None
            self.last_used = time.monotonic()
            self._next()
