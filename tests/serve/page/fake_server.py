"""A server that speaks the API and says what a test wrote down, when the test lets it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Self

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pocketmoe.serve.page.document import document
from tests.hang import HANG_S

Piece = str | Mapping[str, Any] | threading.Event  # text, a raw event or {"comment": ...}, or what to wait for
LAYERS, EXPERTS = 4, 8
KEY = "sesame"


class FakeServer:
    """`answers`: what to say to one request after the other. `asked`: paths and bodies that came."""

    def __init__(self) -> None:
        self.reset()
        routes = [
            Route("/", self._page),
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._answer, methods=["POST"]),
            Route("/v1/completions", self._answer, methods=["POST"]),
            Route("/pocketmoe/state", self._state),
        ]
        config = uvicorn.Config(Starlette(routes=routes), port=0, log_level="error", lifespan="off", ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def reset(self) -> None:
        """As it was before any test."""
        self.answers: list[Sequence[Piece] | Response] = []
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.left = threading.Event()  # a client went away within an answer
        self.key: str | None = None
        self.models = [{"id": "tiny", "object": "model", "pocketmoe": {"chat": True}}]
        self.state = made_up_state()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}/"

    def __enter__(self) -> Self:
        started = threading.Event()
        startup = self._server.startup

        async def start(sockets: Any = None) -> None:
            await startup(sockets)
            started.set()

        self._server.startup = start  # type: ignore[method-assign]
        self._thread.start()
        assert started.wait(HANG_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join(HANG_S)

    async def _page(self, request: Request) -> Response:
        return Response(document().body, headers=dict(document().headers))

    async def _models(self, request: Request) -> Response:
        return self._refused(request) or JSONResponse({"object": "list", "data": self.models})

    async def _state(self, request: Request) -> Response:
        return self._refused(request) or JSONResponse(self.state)

    def _refused(self, request: Request) -> Response | None:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return refusal(401, "this server wants its key")
        return None

    async def _answer(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        self.asked.append((request.url.path, await request.json()))
        answer = self.answers.pop(0)
        if isinstance(answer, Response):
            return answer
        chat = request.url.path.endswith("chat/completions")
        return StreamingResponse(self._events(answer, chat), media_type="text/event-stream")

    async def _events(self, pieces: Sequence[Piece], chat: bool) -> AsyncIterator[str]:
        try:
            for piece in pieces:
                if isinstance(piece, threading.Event):
                    while not piece.is_set():
                        await asyncio.sleep(0.005)
                elif isinstance(piece, str):
                    delta = {"delta": {"content": piece}} if chat else {"text": piece}
                    yield event({"choices": [{"index": 0, **delta, "finish_reason": None}]})
                elif "comment" in piece:
                    yield f": {piece['comment']}\n\n"
                else:
                    yield event(piece)
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.left.set()
            raise


def event(piece: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(piece)}\n\n"


def reasoning(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"reasoning_content": text}, "finish_reason": None}]}


def finish(why: str = "stop") -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": why}]}


def usage(prompt: int, answer: int, cached: int) -> dict[str, Any]:
    counts = {"prompt_tokens": prompt, "completion_tokens": answer, "prompt_tokens_details": {"cached_tokens": cached}}
    return {"choices": [], "usage": counts}


def refusal(status: int, message: str, **headers: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "x", "code": None}}, status, headers)


def made_up_state() -> dict[str, Any]:
    """Half of the experts are in memory, none was used."""
    return {
        "budget_bytes": 200_000_000,
        "used_bytes": 150_000_000,
        "peak_bytes": 170_000_000,
        "claims": {"process": 70_000_000, "dense weights": 30_000_000, "expert slots": 80_000_000},
        "running": 0,
        "waiting": 0,
        "models": [
            {
                "id": "tiny",
                "loaded": True,
                "resident": ["10" * (EXPERTS // 2)] * LAYERS,
                "uses": [[0] * EXPERTS for _ in range(LAYERS)],
                "counts": {
                    "hits": 0,
                    "prefetch_hits": 0,
                    "misses": 0,
                    "bytes_read": 0,
                    "wait_s": 0.0,
                    "busy_s": 0.0,
                    "tokens": 0,
                },
            }
        ],
    }
