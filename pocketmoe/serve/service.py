"""A request's way: ticket, body, model, prompt, place, answer. What is wrong on it, the client is told in its API."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field

from starlette.types import Receive, Scope, Send

from pocketmoe.errors import PocketMoEError
from pocketmoe.runtime.model import Model
from pocketmoe.serve.answers import Answering, Prepared
from pocketmoe.serve.api.errors import ApiError, translated
from pocketmoe.serve.api.sampling import encode
from pocketmoe.serve.api.work import Ended, Question, Reply, Work
from pocketmoe.serve.guard import dialect_of
from pocketmoe.serve.http import (
    ClientGone,
    declared_bytes,
    read_body,
    send_error,
    send_events,
    send_json,
    while_connected,
)
from pocketmoe.serve.load import RETRY_S, Admission
from pocketmoe.serve.log import Log
from pocketmoe.serve.metrics import Metrics
from pocketmoe.serve.models import Models

Read = Callable[[bytes], tuple[Work, Reply]]

_LONGEST_PATH = 200  # characters of a path that there is not
BODY_S = 30.0  # that a body may take to arrive


@dataclass
class Entry:
    """What is noted of one request, for its line in the log."""

    id: str
    path: str
    began: float = field(default_factory=time.perf_counter)
    status: int = 0
    model: str | None = None
    stream: bool | None = None
    code: str | None = None
    prompt_tokens: int | None = None
    reused_tokens: int | None = None
    generated_tokens: int | None = None
    queue_s: float | None = None
    ttft_s: float | None = None
    hit_rate: float | None = None
    bytes_read: int | None = None
    finish: str | None = None
    gone: bool | None = None
    error: str | None = None  # why the server could not, where that is its own fault
    asked: str | None = None  # texts only where they were asked for
    answered: str | None = None


def about_model(error: PocketMoEError, param: str | None, model: Model) -> ApiError:
    """What a model could not do, without the place where it is on this machine."""
    told = translated(error, param)
    told.message = told.message.replace(f"{model.bundle.root}/", "").replace(str(model.bundle.root), "the model")
    return told


@dataclass(frozen=True)
class Service:
    """What handlers share."""

    models: Models
    admission: Admission
    answering: Answering
    metrics: Metrics
    log: Log
    body_limit_bytes: int
    timeout_s: float

    def endpoint(self, read: Read) -> Endpoint:
        """A path that answers requests which `read` understands."""
        return Endpoint(self, read)

    def question(self, read: Callable[[bytes], Question]) -> Questions:
        """A path that answers what a model can tell at once."""
        return Questions(self, read)

    @asynccontextmanager
    async def noted(self, scope: Scope, send: Send) -> AsyncGenerator[Entry]:
        """Whatever happens within: the client is told, and there is a line in the log."""
        entry = Entry(scope["state"]["id"], scope["path"])
        try:
            yield entry
        except ClientGone:
            entry.gone, entry.status = True, entry.status or 499
            self.metrics.client_gone()
        except TimeoutError:
            await self._fail(
                ApiError(504, "the answer took longer than this server allows", code="timeout"), entry, send
            )
        except Exception as error:  # noqa: BLE001 - the boundary: what it is, is told in the log
            self.explain(error, entry)
            await self._fail(translated(error), entry, send)
        finally:
            self._note(entry)

    @asynccontextmanager
    async def leased(self, name: str) -> AsyncGenerator[Model]:
        """A model, loaded. Raises ApiError for one that is not served, or cannot be loaded."""
        async with AsyncExitStack() as stack:
            try:
                model = await stack.enter_async_context(self.models.lease(name))
            except PocketMoEError as error:
                why = "the model cannot be loaded; the server's log says why"
                raise ApiError(503, why, code="model_unavailable", retry_after=RETRY_S) from error
            yield model

    def explain(self, error: Exception, entry: Entry) -> None:
        """Why the server could not, for the log: a line of ours, or where it happened if that should not have been."""
        if translated(error).status < 500:
            return
        cause = error.__cause__ if isinstance(error, ApiError) else error
        if isinstance(cause, PocketMoEError):
            entry.error = cause.one_line()
        elif not isinstance(error, ApiError):
            self.log.failure("failure", error, id=entry.id)

    def refused(self, scope: Scope, error: ApiError) -> None:
        """Note a request that did not come as far as to a path: a foreign page, no key, no such path."""
        path = scope["path"][:_LONGEST_PATH]
        self.metrics.done("other", error.status, error.code)
        self.log.event("request", id=scope["state"]["id"], path=path, status=error.status, code=error.code)

    async def _fail(self, error: ApiError, entry: Entry, send: Send) -> None:
        entry.code = error.code
        if not entry.status:
            entry.status = error.status
            await send_error(send, error, dialect_of(entry.path), {"x-request-id": entry.id})

    def _note(self, entry: Entry) -> None:
        self.metrics.done(entry.path, entry.status, entry.code)
        fields = {name: value for name, value in vars(entry).items() if name != "began"}
        self.log.event("request", **fields, total_s=time.perf_counter() - entry.began)


@dataclass(frozen=True)
class Endpoint:
    """An ASGI application that answers requests of one kind."""

    service: Service
    read: Read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self.service
        async with service.noted(scope, send) as entry:
            limit = service.body_limit_bytes
            nbytes = declared_bytes(scope, limit)
            with service.admission.ticket():
                async with asyncio.timeout(service.timeout_s):
                    await self._answer(entry, nbytes, receive, send)

    async def _answer(self, entry: Entry, nbytes: int, receive: Receive, send: Send) -> None:
        service = self.service
        async with service.admission.body(nbytes):
            body = await read_body(receive, service.body_limit_bytes, BODY_S)
            work, reply = self.read(body)
            entry.model, entry.stream = work.model, reply.streams
            entry.asked = body.decode() if service.log.text else None
            await while_connected(receive, self._with_model(work, reply, entry, send))

    async def _with_model(self, work: Work, reply: Reply, entry: Entry, send: Send) -> None:
        service = self.service
        async with service.leased(work.model) as model:
            try:
                prepared = await service.answering.prepare(work, model)
            except PocketMoEError as error:
                raise about_model(error, work.at_fault(error), model) from error
            entry.prompt_tokens = prepared.choices[0].prompt_tokens
            if reply.streams:
                await self._stream(prepared, reply, entry, send)
            else:
                await self._send_whole(prepared, reply, model, entry, send)

    async def _send_whole(self, prepared: Prepared, reply: Reply, model: Model, entry: Entry, send: Send) -> None:
        for _ in reply.begin(model, prepared.choices):
            pass
        async with aclosing(self._pieces(prepared, reply, entry)) as pieces:
            async for _ in pieces:
                pass
        body = encode(reply.whole())
        entry.status = 200
        await send_json(send, 200, body, {"x-request-id": entry.id})

    async def _stream(self, prepared: Prepared, reply: Reply, entry: Entry, send: Send) -> None:
        async def pieces() -> AsyncGenerator[bytes]:
            try:
                async with aclosing(self._pieces(prepared, reply, entry)) as found:
                    async for piece in found:
                        yield piece
                for piece in reply.end():
                    yield piece
            except Exception as error:  # noqa: BLE001 - headers are sent: the error is part of the stream
                self.service.explain(error, entry)
                entry.code = translated(error).code
                yield reply.failed(error)

        entry.status = 200
        async with aclosing(pieces()) as events:
            await send_events(send, reply.begin(prepared.model, prepared.choices), events, {"x-request-id": entry.id})

    async def _pieces(self, prepared: Prepared, reply: Reply, entry: Entry) -> AsyncGenerator[bytes]:
        service = self.service
        began = time.perf_counter()
        async with aclosing(service.answering.events(prepared)) as events:
            async for event in events:
                if entry.queue_s is None:
                    entry.queue_s = time.perf_counter() - began
                    service.metrics.waited(entry.queue_s)
                if isinstance(event, Ended):
                    self._note(event, prepared.work.model, entry)
                for piece in reply.push(event):
                    yield piece

    def _note(self, ended: Ended, model: str, entry: Entry) -> None:
        result = ended.result
        self.service.metrics.answered(model, result)
        entry.generated_tokens = (entry.generated_tokens or 0) + len(result.tokens)
        entry.reused_tokens, entry.ttft_s = result.reused_tokens, result.ttft_s
        entry.hit_rate, entry.finish = result.expert_hit_rate, result.stop_reason
        entry.bytes_read = (entry.bytes_read or 0) + result.bytes_read
        if self.service.log.text:
            entry.answered = (entry.answered or "") + result.text


@dataclass(frozen=True)
class Questions:
    """An ASGI application that answers what a model can tell at once: it needs no place."""

    service: Service
    read: Callable[[bytes], Question]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self.service
        async with service.noted(scope, send) as entry:
            nbytes = declared_bytes(scope, service.body_limit_bytes)
            with service.admission.ticket():
                async with asyncio.timeout(service.timeout_s), service.admission.body(nbytes):
                    question = self.read(await read_body(receive, service.body_limit_bytes, BODY_S))
                    await while_connected(receive, self._answer(question, entry, send))

    async def _answer(self, question: Question, entry: Entry, send: Send) -> None:
        entry.model = question.model
        async with self.service.leased(question.model) as model:
            try:
                found = await self.service.answering.ask(question, model)
            except PocketMoEError as error:
                raise about_model(error, question.param, model) from error
        entry.status = 200
        await send_json(send, 200, encode(found), {"x-request-id": entry.id})
