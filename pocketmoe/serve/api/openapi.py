"""The APIs as an OpenAPI description, made from the types that requests are decoded into: /openapi.json."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec

from pocketmoe import __version__
from pocketmoe.serve.api.chat import ChatRequest
from pocketmoe.serve.api.completions import CompletionRequest
from pocketmoe.serve.api.messages import Conversation, MessagesRequest
from pocketmoe.serve.api.responses import ResponseInput, ResponsesRequest
from pocketmoe.serve.api.tokens import DetokenizeRequest, TokenizeRequest

REQUESTS: dict[str, type[msgspec.Struct]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/responses/input_tokens": ResponseInput,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": Conversation,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
_LOOKED_AT = {
    "/health": "The server is up.",
    "/ready": "A model is or was loaded, and the server is not about to end; else 503.",
    "/metrics": "Prometheus' text format.",
    "/v1/models": "The models that are served.",
    "/pocketmoe/state": "Memory, hits and experts, for the page.",
}
_STREAMS = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}
_REFUSALS = {
    "400": "The request cannot be meant, or asks for what is not supported; the error names the field.",
    "401": "The key is missing or wrong.",
    "403": "The host name or the page's origin is not one of the server's.",
    "404": "There is no such model.",
    "408": "The body came too slowly.",
    "413": "The body is too large.",
    "415": "The body is no JSON.",
    "429": "The queue is full: try again after the seconds of Retry-After.",
    "503": "Memory is short, the model cannot be loaded, or the server is shutting down.",
    "504": "The answer took too long.",
}


@cache
def description() -> bytes:
    """JSON."""
    kinds = [*REQUESTS.values()]
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    components["InputMessage"]["required"].remove("type")  # which is put in where it is left out
    paths: dict[str, Any] = {path: {"get": _get(about)} for path, about in _LOOKED_AT.items()}
    for path, kind, schema in zip(REQUESTS, kinds, schemas, strict=True):
        paths[path] = {"post": _post(path, kind, schema)}
    error = {"type": "object", "required": ["error"], "properties": {"error": {"type": "object"}}}
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "PocketMoE", "version": __version__, "description": "Mixture-of-Experts models."},
            "paths": paths,
            "components": {
                "schemas": {**components, "Error": error},
                "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            },
            "security": [{}, {"key": []}],
        }
    )


def _get(about: str) -> dict[str, Any]:
    return {"summary": about, "responses": {"200": {"description": "It is so."}, **_refused("401", "403", "503")}}


def _post(path: str, kind: type[msgspec.Struct], schema: dict[str, Any]) -> dict[str, Any]:
    kinds = ["application/json", *(["text/event-stream"] if path in _STREAMS else [])]
    answer: dict[str, Any] = {"description": "The answer.", "content": {each: {"schema": {}} for each in kinds}}
    return {
        "summary": (kind.__doc__ or path).splitlines()[0],
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"200": answer, **_refused(*_REFUSALS)},
    }


def _refused(*statuses: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {status: {"description": _REFUSALS[status], "content": content} for status in statuses}
