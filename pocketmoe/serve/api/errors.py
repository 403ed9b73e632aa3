"""What goes wrong, as each API says it: an HTTP status and an error object that names the field."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from pocketmoe.errors import BadInput, ContextFull, OverBudget, PocketMoEError

Dialect = Literal["openai", "anthropic"]

_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_LONGEST = 1000  # characters of a message: it may quote what the client has sent


@dataclass
class ApiError(Exception):
    """An answer that is an error. `param`: the field that is at fault. `retry_after`: seconds."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None

    def body(self, dialect: Dialect) -> dict[str, Any]:
        """The error object of one API."""
        message = self.message.encode("utf-8", "replace").decode()[:_LONGEST]
        if dialect == "anthropic":
            named = f"{self.param}: {message}" if self.param else message
            kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error")
            return {"type": "error", "error": {"type": kind, "message": named}}
        kind = _OPENAI_TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def encoded(self, dialect: Dialect) -> bytes:
        return json.dumps(self.body(dialect)).encode()


def refused(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """A field that cannot be what it is."""
    return ApiError(400, message, param, code)


def unsupported(param: str, what: str = "") -> ApiError:
    """A field of the API that this server does not have: refused, since ignoring it would change what was meant."""
    return ApiError(400, what or f"'{param}' is not supported by this server", param, "unsupported_parameter")


def context_full(tokens: int, context: int, param: str | None) -> ApiError:
    """A prompt that leaves no room for an answer, in the words that clients look for."""
    message = (
        f"This model's maximum context length is {context} tokens. However, your prompt is too long: "
        f"{tokens} tokens > {context - 1} maximum. Please shorten it."
    )
    return ApiError(400, message, param, "context_length_exceeded")


def translated(error: BaseException, param: str | None = None) -> ApiError:
    """Whatever was raised while a request was answered, as the client is told of it.

    Only errors of this package carry words for users; of anything else nothing is told but that it happened.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextFull):
        return context_full(error.tokens, error.context, param)
    if isinstance(error, BadInput) and type(error) is BadInput:
        return ApiError(400, error.one_line(), param, "invalid_value")
    if isinstance(error, OverBudget | MemoryError):
        return ApiError(
            503, "the server's memory does not suffice for this request", code="out_of_memory", retry_after=5
        )
    if isinstance(error, PocketMoEError):
        return ApiError(503, "the model cannot be used; the server's log says why", code="model_unavailable")
    return ApiError(500, "something went wrong in the server; its log says what")
