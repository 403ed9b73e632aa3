"""Ray, the replicas in it, and the front before them: from start to end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pocketmoe
from pocketmoe.errors import BadInput, PocketMoEError, install
from pocketmoe.serve.app import guarded
from pocketmoe.serve.log import Log
from pocketmoe.serve.replicas.front import Front, Lost, Told
from pocketmoe.serve.replicas.replica import Loaded, Replica
from pocketmoe.serve.server import Server, ServeRequest, config_of, libraries_log_to, listen, url_of

LOCAL = "local"
_HEALTH_S = 600  # that a replica may be busy without a word: it loads, or computes a long prompt


def import_ray_serve() -> None:
    """For the thread that calls, since Ray prepares its process then. Raises BadInput where it is not installed."""
    try:
        import_module("ray.serve")
    except ImportError as error:
        raise BadInput("--ray needs Ray Serve, which is not installed", install("serve,ray")) from error


class Cluster:
    """Replicas of one server behind one address."""

    def __init__(self, request: ServeRequest, address: str, replicas: int, write: Callable[[str], None]) -> None:
        """`address`: of a Ray cluster, as `ray.init` takes it; `local`: one that is started here. `replicas` >= 1.

        `request.load.memory` is each replica's. Raises BadInput for an address that cannot be listened on.
        """
        import_ray_serve()
        self._request, self._address, self._replicas, self._write = request, address, replicas, write
        self._name = f"pocketmoe-{uuid.uuid4().hex[:8]}"  # others may be served by the same cluster
        self._socket = listen(request.host, request.port)
        self.server: Server | None = None

    @property
    def url(self) -> str:
        return url_of(self._socket)

    def run(self, on_ready: Callable[[], None] = lambda: None) -> int | None:
        """Serve until a signal; as `Serving.run`."""
        with contextlib.closing(self._socket), _ray(self._address), libraries_log_to(Log(self._write)):
            names = [f"{self._name}-{index}" for index in range(self._replicas)]
            try:
                return asyncio.run(self._run([self._deploy(name) for name in names], on_ready))
            finally:
                _take_back(names if self._address != LOCAL else [])

    async def _run(self, handles: list[Any], on_ready: Callable[[], None]) -> int | None:
        request = self._request
        replicas = [Deployed(handle) for handle in handles]
        loaded = await asyncio.gather(*(each.load() for each in replicas))
        parallel = min(each.parallel for each in loaded)
        front = Front(replicas, parallel, min(each.body_bytes for each in loaded), self._write)
        for index, each in enumerate(loaded):
            front.log(each.lines, index)
        app = guarded(front, request.names, request.origins, request.keys)
        self.server = Server(config_of(app, request), front)
        serving = asyncio.create_task(self.server.serve(sockets=[self._socket]))
        on_ready()
        await serving
        for index, lines in enumerate(
            await asyncio.gather(*(each.close() for each in replicas), return_exceptions=True)
        ):
            front.log(lines if isinstance(lines, list) else [], index)
        return self.server.forced

    def _deploy(self, name: str) -> Any:
        """An application of one replica, so that a request can be sent to this one and no other."""
        from ray import serve

        ray_serve: Any = serve
        request = self._request
        one = replace(request, host="127.0.0.1", port=0, keys=(), names=(), origins=())
        bundles = {name: path.resolve() for name, path in request.bundles.items()}
        deployment = ray_serve.deployment(Replica).options(
            name="replica",
            num_replicas=1,
            max_ongoing_requests=request.queue + request.connections,  # it refuses by itself what is too much
            ray_actor_options={"num_cpus": request.load.threads or 1},
            health_check_timeout_s=_HEALTH_S,
            graceful_shutdown_timeout_s=request.drain_s,
        )
        application = deployment.bind(replace(one, bundles=bundles))
        return ray_serve.run(application, name=name, route_prefix=None)


class Deployed:
    """A replica in Ray."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True)

    async def load(self) -> Loaded:
        """Raises what loading raises."""
        with _translated():
            return await self._handle.load.remote()

    async def close(self) -> list[str]:
        """Raises Lost."""
        with _translated():
            return await self._handle.close.remote()

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Told]:
        """What the replica tells. Closed early, the replica is told so. Raises Lost."""
        found = self._streaming.answer.remote(scope, body)
        ended = False
        try:
            with _translated():
                async for told in found:
                    yield told
            ended = True
        finally:
            if not ended:
                found.cancel()


@contextlib.contextmanager
def _translated() -> Generator[None]:
    """Ray's errors as ours: an error of the replica's own as it was, one of the way there as Lost."""
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import RayServeException

    try:
        yield
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, PocketMoEError) else error from None
    except (RayError, RayServeException) as error:
        raise Lost(str(error)) from error


@contextlib.contextmanager
def _ray(address: str) -> Generator[None]:
    """A Ray of our own, or a cluster, which is sent our code; none of Ray's own listens for requests."""
    import ray
    from ray import serve

    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if address == LOCAL:
        options |= {"address": "local", "include_dashboard": False}
    else:
        options |= {"address": address, "runtime_env": {"py_modules": [str(Path(pocketmoe.__file__).parent)]}}
    try:
        ray.init(**options)
    except Exception as error:  # a node that does not start is an Exception and no more
        raise BadInput(f"Ray at {address} does not answer ({error})", "See `ray status` there.") from error
    try:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING", "enable_access_log": False})
        yield
    finally:
        ray.shutdown()


def _take_back(names: Sequence[str]) -> None:
    """End our applications in a cluster that goes on."""
    from ray import serve

    for name in names:
        with contextlib.suppress(Exception):  # it is gone already
            serve.delete(name)
