"""The application: paths, and what stands before them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from pocketmoe.serve.api import chat, completions, messages, responses, tokens
from pocketmoe.serve.api.errors import ApiError, translated
from pocketmoe.serve.api.openapi import description
from pocketmoe.serve.api.sampling import encode
from pocketmoe.serve.guard import Guard, dialect_of
from pocketmoe.serve.metrics import CONTENT_TYPE
from pocketmoe.serve.page.document import document
from pocketmoe.serve.service import Service
from pocketmoe.serve.state import state

Note = Callable[[Scope, ApiError], None]


class Numbered:
    """Gives each request a name, by which it is found in the log; notes those that are refused on the way there."""

    def __init__(self, app: ASGIApp, note: Note | None = None) -> None:
        self._app, self._note = app, note

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope.setdefault("state", {})["id"] = uuid.uuid4().hex
        await self._app(scope, receive, send)
        refused: ApiError | None = scope.get("state", {}).get("refused")
        if refused and self._note:
            self._note(scope, refused)


def make_app(service: Service, names: Sequence[str], origins: Sequence[str], keys: Sequence[str]) -> Starlette:
    """`names`: hosts that the server is known by; `origins`: foreign pages that may call; `keys`: none: not asked."""
    pages = Pages(service)
    routes = [
        Route("/", pages.page),
        Route("/pocketmoe/state", pages.state),
        Route("/health", pages.health),
        Route("/ready", pages.ready),
        Route("/metrics", pages.metrics),
        Route("/openapi.json", pages.openapi),
        Route("/v1/models", pages.models),
        Route("/v1/models/{name:path}", pages.model),
        Route("/v1/chat/completions", service.endpoint(chat.read), methods=["POST"]),
        Route("/v1/completions", service.endpoint(completions.read), methods=["POST"]),
        Route("/v1/responses", service.endpoint(responses.read), methods=["POST"]),
        Route("/v1/responses/input_tokens", service.question(responses.count), methods=["POST"]),
        Route("/v1/messages", service.endpoint(messages.read), methods=["POST"]),
        Route("/v1/messages/count_tokens", service.question(messages.count), methods=["POST"]),
        Route("/tokenize", service.question(tokens.tokenize), methods=["POST"]),
        Route("/detokenize", service.question(tokens.detokenize), methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {404: _unknown, 405: _unknown, ApiError: _told, Exception: _failed}
    guards = [Middleware(each, **options) for each, options in _guards(names, origins, keys, service.refused)]
    app = Starlette(routes=routes, middleware=guards, exception_handlers=handlers)
    app.state.log = service.log
    app.router.redirect_slashes = False  # a redirect is none of the API's answers
    return app


def guarded(app: ASGIApp, names: Sequence[str], origins: Sequence[str], keys: Sequence[str]) -> ASGIApp:
    """An application behind what stands before ours."""
    for each, options in reversed(_guards(names, origins, keys, None)):
        app = each(app, **options)
    return app


def _guards(
    names: Sequence[str], origins: Sequence[str], keys: Sequence[str], note: Note | None
) -> list[tuple[Any, dict[str, Any]]]:
    """What stands before an application, the outermost first."""
    cors = {"allow_origins": [*origins], "allow_methods": ["GET", "POST"], "allow_headers": ["*"], "max_age": 600}
    found: list[tuple[Any, dict[str, Any]]] = [(Numbered, {"note": note}), (CORSMiddleware, cors)]
    guard = (Guard, {"names": names, "origins": origins, "keys": keys})
    return [*(found if origins else found[:1]), guard]


async def _unknown(request: Request, error: Exception) -> Response:
    """Starlette knows no such path, or not that method of it."""
    status: int = getattr(error, "status_code", 404)
    what = "there is nothing at this path" if status == 404 else "this path does not have that method"
    told = ApiError(status, what, code="not_found" if status == 404 else "method_not_allowed")
    return _response(told, request, getattr(error, "headers", None))  # Allow


async def _told(request: Request, error: Exception) -> Response:
    return _response(translated(error), request)


async def _failed(request: Request, error: Exception) -> Response:
    request.app.state.log.failure("failure", error, id=request.state.id)
    return _response(translated(error), request)


def _response(error: ApiError, request: Request, headers: Mapping[str, str] | None = None) -> Response:
    request.state.refused = error
    return Response(error.encoded(dialect_of(request.url.path)), error.status, headers, "application/json")


class Pages:
    """What is looked at: models, health, metrics."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def page(self, request: Request) -> Response:  # noqa: ARG002 - starlette's signature, here and below
        found = document()
        return Response(found.body, headers=dict(found.headers))

    async def state(self, request: Request) -> Response:  # noqa: ARG002
        return _json(state(self._service.models, self._service.admission))

    async def health(self, request: Request) -> Response:  # noqa: ARG002
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:  # noqa: ARG002
        models, draining = self._service.models, self._service.admission.draining
        is_ready = not draining and (models.ever_loaded or models.loaded is not None)
        return _json({"status": "ready" if is_ready else "loading"}, 200 if is_ready else 503)

    async def metrics(self, request: Request) -> Response:  # noqa: ARG002
        return Response(self._service.metrics.page(), headers={"content-type": CONTENT_TYPE})

    async def openapi(self, request: Request) -> Response:  # noqa: ARG002
        return Response(description(), media_type="application/json")

    async def models(self, request: Request) -> Response:  # noqa: ARG002
        return _json({"object": "list", "data": [self._told(name) for name in self._service.models.bundles]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._service.models.bundles:
            raise ApiError(404, f"the model '{name}' does not exist here", "model", "model_not_found")
        return _json(self._told(name))

    def _told(self, name: str) -> dict[str, Any]:
        models = self._service.models
        served = models.bundles[name]
        loaded = "loaded" if name == models.loaded_name else "loading" if name == models.loading else "unloaded"
        return {
            "id": name,
            "object": "model",
            "created": models.created,
            "owned_by": "pocketmoe",
            "max_model_len": served.context,
            "pocketmoe": {"chat": served.chats, "state": loaded},
        }


def _json(value: Any, status: int = 200) -> Response:
    return Response(encode(value), status, media_type="application/json")
