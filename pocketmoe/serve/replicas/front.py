"""One address before all replicas: what is forwarded, and to whom; what is answered by all together."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol, cast

from starlette.types import Message, Receive, Scope, Send

from pocketmoe.serve.api.errors import ApiError
from pocketmoe.serve.api.sampling import encode
from pocketmoe.serve.guard import dialect_of
from pocketmoe.serve.http import ClientGone, declared_bytes, read_body, send_error, send_json, while_connected
from pocketmoe.serve.metrics import CONTENT_TYPE
from pocketmoe.serve.replicas.merging import merged_metrics, merged_states
from pocketmoe.serve.replicas.prefix_routing import PrefixRouting
from pocketmoe.serve.service import BODY_S

Told = tuple[str, Any]
_RETRY_S = 5


class Lost(Exception):
    """A replica has ended, or cannot be reached."""


class Reached(Protocol):
    """A replica, wherever it is."""

    def answer(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Told]:
        """As `Replica.answer`. Raises Lost."""
        ...


class Front:
    """An ASGI application. What is computed goes to one replica, what is looked at comes from all."""

    def __init__(
        self, replicas: Sequence[Reached], parallel: int, body_limit_bytes: int, write: Callable[[str], None]
    ) -> None:
        """`parallel`: how many requests a replica answers at once. `write`: where lines of the log go."""
        self._replicas = replicas
        self._limit = body_limit_bytes
        self._write = write
        self.routing = PrefixRouting(len(replicas), parallel)
        self.draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            if self.draining and scope["method"] == "POST":
                raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=_RETRY_S)
            await self._answer(scope, receive, noted)
        except ClientGone:
            return
        except ApiError as error:
            if begun:
                raise
            await send_error(send, error, dialect_of(scope["path"]))

    def log(self, lines: Sequence[str], replica: int) -> None:
        """Write what a replica has logged, and whose it is."""
        for line in lines:
            self._write(json.dumps({**json.loads(line), "replica": replica}))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if scope["method"] == "POST":
            await self._forward_post(scope, receive, send)
        elif path in {"/metrics", "/pocketmoe/state"}:
            await self._from_all(path, scope, send)
        else:
            await self._pass_on(self._any(), scope, b"", send)

    async def _forward_post(self, scope: Scope, receive: Receive, send: Send) -> None:
        declared_bytes(scope, self._limit)
        body = await read_body(receive, self._limit, BODY_S)
        await while_connected(receive, self._routed(scope, body, send))

    async def _routed(self, scope: Scope, body: bytes, send: Send) -> None:
        """To the replica that has the text's beginning; to another one where that is lost before it has answered."""
        lost: list[int] = []
        while True:
            index = self.routing.choose(_understood(body), without=lost)
            try:
                await self._pass_on(index, scope, body, send)
                return
            except Lost:
                self.routing.forget(index)
                lost.append(index)
                if len(lost) == len(self._replicas):
                    raise _unreachable() from None

    async def _pass_on(self, index: int, scope: Scope, body: bytes, send: Send) -> None:
        """Raises Lost where nothing was sent yet, ApiError where an answer broke off."""
        self.routing.loads[index] += 1
        begun = False
        try:
            async with aclosing(self._replicas[index].answer(_plain(scope), body)) as told:
                async for kind, what in told:
                    if kind == "log":
                        self.log([what], index)
                        continue
                    begun = True
                    await send(what)
        except Lost:
            if begun:
                raise _unreachable() from None
            raise
        finally:
            self.routing.loads[index] -= 1

    async def _from_all(self, path: str, scope: Scope, send: Send) -> None:
        bodies = await asyncio.gather(*(self._body(replica, scope) for replica in self._replicas))
        there = [body for body in bodies if body is not None]
        if not there:
            raise _unreachable()
        if path == "/metrics":
            page = merged_metrics([body.decode() for body in there]).encode()
            headers = [(b"content-type", CONTENT_TYPE.encode()), (b"content-length", str(len(page)).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": page})
        else:
            await send_json(send, 200, encode(merged_states([json.loads(body) for body in there])), {})

    async def _body(self, replica: Reached, scope: Scope) -> bytes | None:
        """A whole answer; None from one that is lost."""
        body = b""
        try:
            async with aclosing(replica.answer(_plain(scope), b"")) as told:
                async for kind, what in told:
                    if kind == "message":
                        body += what.get("body", b"")
        except Lost:
            return None
        return body

    def _any(self) -> int:
        return min(range(len(self._replicas)), key=lambda index: self.routing.loads[index])


def _plain(scope: Scope) -> dict[str, Any]:
    """What of a scope is sent to another process: who asks, and with which key, the front has settled already."""
    settled = {b"host", b"origin", b"authorization", b"x-api-key"}
    headers = [(b"host", b"localhost"), *(each for each in scope["headers"] if each[0] not in settled)]
    names = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path")
    return {**{name: scope[name] for name in names if name in scope}, "headers": headers}


def _understood(body: bytes) -> Mapping[str, Any]:
    """What can be read of a body; what is wrong with it, a replica says."""
    try:
        found: Any = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def _unreachable() -> ApiError:
    return ApiError(
        503, "no replica can be reached; they are being started again", code="replica_lost", retry_after=_RETRY_S
    )
