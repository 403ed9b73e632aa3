"""The server: its socket, its signals, its threads, from the first model to the last answer."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import uvicorn
from starlette.types import ASGIApp

from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.chat_template.template import DEFAULT
from pocketmoe.errors import BadInput
from pocketmoe.grammar.guide import guide_bytes, is_available
from pocketmoe.runtime.engine.kv_cache import state_bytes
from pocketmoe.runtime.memory.budget import available_bytes
from pocketmoe.runtime.memory.pressure import next_budget, read_pressure
from pocketmoe.runtime.model import DEFAULT_CONTEXT, LoadRequest, Model
from pocketmoe.serve.answers import Answering
from pocketmoe.serve.api.errors import ApiError
from pocketmoe.serve.app import make_app
from pocketmoe.serve.connections import ACCEPTED_AT_ONCE, HEADERS_BYTES, LimitedProtocol
from pocketmoe.serve.load import Admission
from pocketmoe.serve.log import Forwarded, Log
from pocketmoe.serve.metrics import Metrics
from pocketmoe.serve.models import Models, Served
from pocketmoe.serve.service import Service

ELASTIC_S = 10.0  # between looks at the system's memory
_WORTHWHILE = 0.05  # of the budget: a change of it
_MOST_PARALLEL = 4  # unless more are asked for
_BODIES = 2  # as many of the largest are held at once, until their text is token ids
_BYTES_PER_BODY_BYTE = 8  # of memory, while a body is read, decoded and made into token ids
_BYTES_PER_REQUEST = 64 << 10  # connection, headers, tasks, events of an answer
_BYTES_PER_TOKEN = 64  # of a prompt: in JSON at most, but for texts of long blanks; and as ids, twice
_BACKLOG = 1024  # connections
_LEAST_BODY_BYTES = 256 << 10
_LIBRARIES = ("uvicorn", "uvicorn.error", "uvicorn.access", "asyncio")


@dataclass(frozen=True)
class ServeRequest:
    """What to serve, to whom, and how much at once."""

    bundles: Mapping[str, Path]  # by the name under which requests ask for them
    load: LoadRequest
    host: str = "127.0.0.1"
    port: int = 8080  # 0: any that is free
    parallel: int | None = None  # answers at once, each with memory for a whole context; None: as many as are cheap
    queue: int = 32  # requests that wait for a place
    connections: int = 256
    keys: tuple[str, ...] = ()
    names: tuple[str, ...] = ()  # under which the server is known, beside addresses and localhost
    origins: tuple[str, ...] = ()  # of foreign pages that may call it
    body_limit_bytes: int | None = None  # None: what a text as long as the context takes
    idle_unload_s: float | None = None  # after so long without a request a model's memory is given back
    elastic: bool = False  # the budget gives way while the system is short of memory
    timeout_s: float = 1800.0  # for a request, all in all
    drain_s: int = 60  # for answers that are running when the server is asked to end
    log_text: bool = False

    def body_bytes(self, context: int) -> int:
        """The longest body, for models whose texts have at most so many tokens."""
        return self.body_limit_bytes or max(_LEAST_BODY_BYTES, _BYTES_PER_TOKEN * context)

    def beside_bytes(self, context: int) -> int:
        """What serving takes of memory beyond what the process has before the first request."""
        bodies = _BODIES * _BYTES_PER_BODY_BYTE * self.body_bytes(context)
        return bodies + (_MOST_PARALLEL + self.queue) * (_BYTES_PER_REQUEST + _BYTES_PER_TOKEN * context)


class Unwanted(Exception):
    """The server ends while a model is loaded that nobody waits for."""


class Draining(Protocol):
    """What takes requests in, until it is told that the server is about to end."""

    draining: bool


class Server(uvicorn.Server):
    """uvicorn's, with signals of our own: the first lets running answers end, the second does not."""

    def __init__(self, config: uvicorn.Config, admission: Draining) -> None:
        super().__init__(config)
        self._admission = admission
        self.forced: int | None = None  # the signal that left no time

    def stop(self) -> None:
        """Take no more; end once what runs has ended."""
        self._admission.draining = True
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - a signal handler
        if self.should_exit:
            self.force_exit, self.forced = True, sig
        self.stop()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Serving:
    """A server that has its socket and is about to run."""

    def __init__(
        self,
        request: ServeRequest,
        write: Callable[[str], None],
        progress: Progress = no_progress,
        *,
        listens: bool = True,
    ) -> None:
        """`write`: where lines of the log go. `listens`: False: its `app` is called by other means than a socket.

        Raises BadInput for bundles and addresses that cannot be used.
        """
        self.request = request
        bundles = {name: _served(path, request.load.context) for name, path in request.bundles.items()}
        self.socket = listen(request.host, request.port) if listens else None
        self.log = Log(write, text=request.log_text)
        self.parallel = request.parallel or min(_cheap_texts(each, request.load) for each in bundles.values())
        pools = {"answers": self.parallel, "tokenizing": 1, "loading": 1}
        self._threads = {name: _started(name, size) for name, size in pools.items()}
        self._context = max(served.context for served in bundles.values())
        body_bytes = request.body_bytes(self._context)
        self.admission = Admission(self.parallel, request.queue, _BODIES * body_bytes)
        self.models = Models(bundles, functools.partial(self._load, progress), self._threads["loading"])
        self.metrics = Metrics()
        self.service = Service(
            models=self.models,
            admission=self.admission,
            answering=Answering(
                self.admission.places,
                self._threads["answers"],
                self._threads["tokenizing"],
                structured=request.load.structured is not False,
            ),
            metrics=self.metrics,
            log=self.log,
            body_limit_bytes=body_bytes,
            timeout_s=request.timeout_s,
        )
        self.peak_and_budget: tuple[int, int] | None = None  # once all is over
        self._budget: int | None = None  # less than was asked for
        self._full = 0  # what was asked for, for the loaded model
        self._watch()
        self.app = make_app(self.service, request.names, request.origins, request.keys)
        self.server = Server(config_of(self.app, request, self._refused), self.admission)

    @property
    def url(self) -> str:
        assert self.socket
        return url_of(self.socket)

    def run(self, on_ready: Callable[[], None] = lambda: None) -> int | None:
        """Serve until a signal. Returns the signal that left answers no time, or None: all have ended.

        `on_ready`: called once the first model is loaded. Raises what loading it does.
        """
        with libraries_log_to(self.log):
            asyncio.run(self._run(on_ready))
        return self.server.forced

    async def _run(self, on_ready: Callable[[], None]) -> None:
        assert self.socket
        serving = asyncio.create_task(self.server.serve(sockets=[self.socket]))
        idle = asyncio.create_task(self.unload_when_idle())
        elastic = asyncio.create_task(self.give_way())
        first = asyncio.create_task(self._first_model(on_ready))
        try:
            await asyncio.wait([serving, first], return_when=asyncio.FIRST_COMPLETED)
            if first.done():
                with contextlib.suppress(Unwanted):
                    await first
            await asyncio.shield(serving)
        except BaseException:
            self.server.stop()
            raise
        finally:
            await serving
            others = (first, idle, elastic)
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            if self.server.forced is None:
                await self.close()

    async def _first_model(self, on_ready: Callable[[], None]) -> None:
        async with self.models.lease(next(iter(self.request.bundles))):
            if self.socket:
                self.socket.listen(_BACKLOG)  # more may wait for the system's turn than are taken on at once
            self.log.event("ready", url=self.url, pid=os.getpid())
            on_ready()

    async def unload_when_idle(self) -> None:
        """Give a model's memory back when nobody has used it for as long as was asked for; again and again."""
        limit = self.request.idle_unload_s
        while limit is not None:
            idle = self.models.idle_s
            if idle is not None and idle >= limit:
                await self.models.unload()
                self.log.event("unloaded", idle_s=idle)
            await asyncio.sleep(max(0.05, limit - (self.models.idle_s or 0)) if limit > 0 else 1)

    async def give_way(self) -> None:
        """Follow the system's memory: the loaded model keeps to another budget from then on."""
        while self.request.elastic:
            await asyncio.sleep(ELASTIC_S)
            with contextlib.suppress(BadInput):  # the model was closed meanwhile
                if model := self.models.loaded:
                    await asyncio.get_running_loop().run_in_executor(self._threads["loading"], self._resize, model)

    def _resize(self, model: Model) -> None:
        """Give a model the budget that the system's memory allows. Raises BadInput when it is closed."""
        budget, pressure = model.engine.budget, read_pressure()
        now = total = budget.total_bytes
        if pressure.is_short:
            now = min(total, budget.claimed_bytes)  # where all experts are in memory there is some to spare
        wanted = next_budget(now, self._full, model.engine.least_bytes, pressure)
        if wanted == self._full > total or abs(wanted - total) > _WORTHWHILE * total:
            self._note_peak(model)
            model.resize(wanted)
            self._budget = None if wanted == self._full else wanted
            self.log.event("resized", budget_bytes=budget.total_bytes)

    def _note_peak(self, model: Model) -> None:
        """Remember where memory came nearest to the budget, or over it."""
        told = model.memory
        found = told["peak"], told["budget"]
        self.peak_and_budget = max(found, self.peak_and_budget or found, key=lambda pair: pair[0] - pair[1])

    async def close(self) -> None:
        """Give everything back, once what is running has ended."""
        await self.models.settled()
        if self.models.loaded:
            self._note_peak(self.models.loaded)
            await asyncio.get_running_loop().run_in_executor(self._threads["loading"], self.models.loaded.close)
        for threads in self._threads.values():
            threads.shutdown(wait=False)

    def _load(self, progress: Progress, name: str) -> Model:
        def wanted(*told: Any) -> None:
            if self.admission.draining and not self.admission.inside:
                raise Unwanted
            progress(*told)

        path = self.request.bundles[name]
        beside = self.request.beside_bytes(self._context)
        model = Model(path, replace(self.request.load, beside_bytes=beside, sequences=self.parallel), wanted)
        self._full = model.memory["budget"]
        if self._budget is not None:  # it has read next to nothing yet
            model.resize(max(model.engine.least_bytes, min(self._budget, self._full)))
        self.log.event("loaded", model=name, load_s=model.load_s, **model.memory)
        return model

    def _refused(self, error: ApiError) -> None:
        self.metrics.done("other", error.status, error.code)
        self.log.event("request", status=error.status, code=error.code)

    def _watch(self) -> None:
        gauge, admission, models = self.metrics.gauge, self.admission, self.models
        gauge("running", "Answers that are computed", lambda: admission.running)
        gauge("waiting", "Requests that wait", lambda: admission.waiting)
        gauge("loaded", "Models in memory", lambda: int(models.loaded is not None))
        gauge("memory_budget_bytes", "For the whole process", lambda: _memory(models, "budget"))
        gauge("memory_peak_bytes", "Of the whole process so far", lambda: _memory(models, "peak"))


def config_of(
    app: ASGIApp, request: ServeRequest, refused: Callable[[ApiError], None] = lambda _: None
) -> uvicorn.Config:
    """uvicorn's, within our limits. `refused`: told of what never becomes a request."""
    return uvicorn.Config(
        app,
        http=functools.partial(LimitedProtocol, most_connections=request.connections, refused=refused),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=HEADERS_BYTES,
        backlog=ACCEPTED_AT_ONCE,
        timeout_graceful_shutdown=request.drain_s,
    )


def url_of(listener: socket.socket) -> str:
    """By which a listening socket is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _memory(models: Models, what: str) -> int:
    with contextlib.suppress(BadInput):  # it is being closed
        return models.loaded.memory[what] if models.loaded else 0
    return 0


def _served(path: Path, wanted: int | None) -> Served:
    """What is known of a bundle. Raises BadInput or DamagedFile for what is none."""
    manifest = Bundle.open(path).manifest
    limit = manifest.model.context_length
    if wanted is not None and wanted > limit:
        raise BadInput(f"{path} has a context of {limit} tokens, less than the {wanted} asked for", "Ask for less.")
    return Served(path, wanted or min(DEFAULT_CONTEXT, limit), chats=DEFAULT in manifest.files)


def _cheap_texts(served: Served, load: LoadRequest) -> int:
    """How many texts at once take a tenth of the memory at most, as long as the context allows; one at least."""
    manifest = Bundle.open(served.path).manifest
    each = state_bytes(manifest.states, served.context)
    if load.structured is not False and is_available():
        each += guide_bytes(manifest.model.vocab_size, 2) - guide_bytes(manifest.model.vocab_size, 1)
    budget = load.memory.total_bytes if load.memory and load.memory.total_bytes else available_bytes()
    return max(1, min(_MOST_PARALLEL, budget // (10 * max(1, each))))


def listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET
    with contextlib.suppress(ValueError):
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise BadInput(f"{host}:{port} cannot be listened on ({reason})", "Choose another --host or --port.") from error
    listener.set_inheritable(False)
    return listener


def _started(name: str, size: int) -> Executor:
    """Threads that have begun, so that their stacks are part of what the process has before memory is reckoned."""
    threads = ThreadPoolExecutor(size, thread_name_prefix=name)
    together = threading.Barrier(size + 1)
    for _ in range(size):
        threads.submit(together.wait)
    together.wait()
    return threads


@contextlib.contextmanager
def libraries_log_to(log: Log) -> Generator[None]:
    """What uvicorn and asyncio have to say is a line of our log, as far as it is about something that went wrong."""
    handler = Forwarded(log)
    found = [logging.getLogger(name) for name in _LIBRARIES]
    before = [(logger.propagate, logger.level) for logger in found]
    for logger in found:
        logger.addHandler(handler)
        logger.propagate = False
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, (propagates, level) in zip(found, before, strict=True):
            logger.removeHandler(handler)
            logger.propagate = propagates
            logger.setLevel(level)
