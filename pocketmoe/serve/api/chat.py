"""OpenAI's chat completions: /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from pocketmoe.runtime.answer import StopReason, TokenLogprob
from pocketmoe.runtime.conversation import Generation
from pocketmoe.runtime.model import Model
from pocketmoe.serve.api.decoding import decode, plain
from pocketmoe.serve.api.errors import ApiError, refused, translated, unsupported
from pocketmoe.serve.api.sampling import DONE, Sampled, Tokens, event, sampling_options
from pocketmoe.serve.api.speech import (
    Call,
    Effort,
    FunctionTool,
    NamedTool,
    ToolChoice,
    call_id,
    held_schema,
    refuse_loose_results,
    text_of,
    tool_options,
)
from pocketmoe.serve.api.work import Choice, Ended, Event, Piece, Progress, Work
from pocketmoe.tools.calls import Part, ToolCall
from pocketmoe.tools.families import Parser

FINISH: dict[StopReason, str] = {
    "eos": "stop",
    "complete": "stop",
    "stop": "stop",
    "length": "length",
    "context": "length",
}


class TextPart(Struct, forbid_unknown_fields=True):
    """Text within a message."""

    text: str
    type: Literal["text"] = "text"


Content = str | Annotated[list[TextPart], Meta(min_length=1)]


class Message(Struct, forbid_unknown_fields=True):
    """What was said, by whom."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None  # an answer that calls tools may have none
    name: str | None = None
    tool_calls: Annotated[list[Call], Meta(min_length=1)] | None = None  # of an earlier answer
    tool_call_id: str | None = None  # which call this is the result of
    reasoning_content: str | None = None  # of an earlier answer
    # What answers have beside that, as they are sent back; there is nothing in it.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Meta(max_length=0)] | None = None


class TextFormat(Struct, forbid_unknown_fields=True, tag="text"):
    """Any text."""


class JsonFormat(Struct, forbid_unknown_fields=True, tag="json_object"):
    """A JSON object."""


class NamedSchema(Struct, forbid_unknown_fields=True):
    schema: dict[str, Any]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None  # the schema is held either way


class SchemaFormat(Struct, forbid_unknown_fields=True, tag="json_schema"):
    """JSON that keeps to a schema."""

    json_schema: NamedSchema


class ChatRequest(Sampled, kw_only=True, forbid_unknown_fields=True):
    """A conversation to be answered."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=10_000)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # variables of the model's chat template
    tools: Annotated[list[FunctionTool], Meta(max_length=512)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    response_format: TextFormat | JsonFormat | SchemaFormat | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = None
    metadata: dict[str, str] | None = None
    verbosity: Literal["medium"] | None = None  # as the model does it
    # Of the API and not supported: there may be nothing in it.
    audio: None = None
    prediction: None = None
    functions: None = None
    function_call: None = None
    web_search_options: None = None
    prompt_cache_retention: None = None
    prompt_cache_options: None = None
    moderation: None = None


def read(body: bytes) -> tuple[Work, ChatReply]:
    """A request, and how it is answered. Raises ApiError."""
    request = decode(body, ChatRequest)
    if request.store:
        raise unsupported("store", "'store' is not supported: this server keeps nothing")
    if request.top_logprobs is not None and not request.logprobs:
        raise refused("top_logprobs", "'top_logprobs' goes with 'logprobs' alone")
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise refused("max_tokens", "give either 'max_tokens' or 'max_completion_tokens'")
    options = sampling_options(request)
    options["max_tokens"] = request.max_completion_tokens or request.max_tokens
    if request.logprobs:
        options["logprobs"] = request.top_logprobs or 0
    variables, places = _variables(request)
    if variables:
        options["template"] = variables
    if (schema := _schema(request.response_format)) is not None:
        options["json_schema"] = schema
    choice = request.tool_choice.function if isinstance(request.tool_choice, NamedTool) else request.tool_choice
    tools = [tool.function for tool in request.tools or ()]
    options |= tool_options(tools, choice, request.parallel_tool_calls)
    for number, message in enumerate(request.messages):
        if message.content is None and not message.tool_calls:
            raise ApiError(400, "a message has no content", f"messages[{number}].content", "missing_required_parameter")
    messages = [said(message) for message in request.messages]
    refuse_loose_results(messages, "messages")
    work = Work(request.model, [messages], "messages", options, request.n or 1, variables=places)
    return work, ChatReply(request)


def _schema(wanted: TextFormat | JsonFormat | SchemaFormat | None) -> dict[str, Any] | None:
    """What the answer is held to. Raises ApiError for a schema that cannot be held."""
    if wanted is None or isinstance(wanted, TextFormat):
        return None
    schema = {"type": "object"} if isinstance(wanted, JsonFormat) else wanted.json_schema.schema
    return held_schema(schema, "response_format")


_EFFORT = "reasoning_effort"
_OWN = frozenset({"messages", "tools", "documents", "template", "add_generation_prompt", "continue_final_message"})


def _variables(request: ChatRequest) -> tuple[dict[str, Any], dict[str, str]]:
    """Variables for the chat template, and the field that sets each; those that it always has cannot be replaced."""
    given = dict(request.chat_template_kwargs or {})
    places = {name: f"chat_template_kwargs.{name}" for name in given}
    for name in given:
        if name in _OWN:
            raise refused(places[name], f"'{name}' is not for a request to set")
    if request.reasoning_effort is not None:
        if _EFFORT in given:
            raise refused(_EFFORT, f"give either '{_EFFORT}' or '{places[_EFFORT]}'")
        given[_EFFORT], places[_EFFORT] = request.reasoning_effort, _EFFORT
    return given, places


def said(message: Message) -> dict[str, Any]:
    """A message as chat templates take it: parts of a text become one text."""
    fields = plain(message)
    fields.pop("annotations", None)
    if isinstance(message.content, list):
        fields["content"] = "".join(part.text for part in message.content)
    if message.role == "developer":
        fields["role"] = "system"  # by which templates know it
    return fields


class ChatReply:
    """Tells an answer as `chat.completion`, or as its chunks."""

    def __init__(self, request: ChatRequest) -> None:
        self.streams = bool(request.stream)
        self._usage = bool(request.stream_options and request.stream_options.include_usage)
        self._ids = bool(request.return_token_ids)
        self._wants_logprobs = bool(request.logprobs)
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.model}
        self._model: Model | None = None
        self._readers: dict[int, Parser] = {}
        self._parts: dict[int, list[Part]] = {}
        self._calls: dict[int, list[dict[str, Any]]] = {}
        self._logprobs: dict[int, list[TokenLogprob]] = {}
        self._results: dict[int, Generation] = {}

    def begin(self, model: Model, choices: Sequence[Choice]) -> Iterator[bytes]:
        self._model = model
        for choice in choices:
            self._readers[choice.index], self._calls[choice.index] = choice.parser, []
            self._parts[choice.index], self._logprobs[choice.index] = [], []
            if self.streams:
                yield self._chunk(choice.index, {"role": "assistant", "content": ""})

    def push(self, event: Event) -> Iterator[bytes]:
        if isinstance(event, Progress):
            yield f": prompt {event.done}/{event.total}\n\n".encode()
        elif isinstance(event, Piece):
            parts = self._readers[event.index].push(event.text)
            yield from self._tell(event.index, parts, event.logprobs, event.tokens)
        elif isinstance(event, Ended):
            parts = self._readers[event.index].finish()
            yield from self._tell(event.index, parts, (), ())
            self._results[event.index] = event.result
            yield self._chunk(event.index, {}, finish=self._finish(event.index, event.result))

    def end(self) -> Iterator[bytes]:
        if self._usage:
            yield event({**self._head, "object": _CHUNK, "choices": [], "usage": usage(self._results.values())})
        yield DONE

    def whole(self) -> dict[str, Any]:
        choices = [self._whole_choice(index, result) for index, result in sorted(self._results.items())]
        return {
            **self._head,
            "object": "chat.completion",
            "choices": choices,
            "usage": usage(self._results.values()),
        }

    def failed(self, error: Exception) -> bytes:
        return event(translated(error).body("openai"))

    def _tell(
        self, index: int, parts: list[Part], logprobs: Sequence[TokenLogprob], tokens: Sequence[int]
    ) -> Iterator[bytes]:
        self._parts[index] += parts
        self._logprobs[index] += logprobs
        told = {"reasoning_content": text_of(parts, "reasoning"), "content": text_of(parts, "content")}
        delta: dict[str, Any] = {name: text for name, text in told.items() if text}
        calls = [_call(part) for part in parts if isinstance(part, ToolCall)]
        if calls:
            before = len(self._calls[index])
            delta["tool_calls"] = [{"index": number, **call} for number, call in enumerate(calls, before)]
            self._calls[index] += calls
        if delta or logprobs or (tokens and self._ids):
            yield self._chunk(index, delta or {"content": ""}, logprobs, tokens)

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: Sequence[TokenLogprob] = (),
        tokens: Sequence[int] = (),
        finish: str | None = None,
    ) -> bytes:
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        if logprobs:
            choice["logprobs"] = {"content": self._told_logprobs(logprobs), "refusal": None}
        if tokens and self._ids:
            choice["token_ids"] = list(tokens)
        chunk: dict[str, Any] = {**self._head, "object": _CHUNK, "choices": [choice]}
        if self._usage:
            chunk["usage"] = None
        return event(chunk)

    def _whole_choice(self, index: int, result: Generation) -> dict[str, Any]:
        parts, calls = self._parts[index], self._calls[index]
        content = text_of(parts, "content")
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
        if calls:
            message["tool_calls"] = calls
        if reasoning := text_of(parts, "reasoning"):
            message["reasoning_content"] = reasoning
        choice: dict[str, Any] = {
            "index": index,
            "message": message,
            "logprobs": None,
            "finish_reason": self._finish(index, result),
        }
        if self._wants_logprobs:
            choice["logprobs"] = {"content": self._told_logprobs(result.logprobs or ()), "refusal": None}
        if self._ids:
            choice["token_ids"] = list(result.tokens)
        return choice

    def _finish(self, index: int, result: Generation) -> str:
        found = FINISH.get(result.stop_reason, "stop")
        return "tool_calls" if found == "stop" and self._calls[index] else found

    def _told_logprobs(self, logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        return [
            {**self._told(each.token, each.logprob), "top_logprobs": [self._told(*top) for top in each.top]}
            for each in logprobs
        ]

    def _told(self, token: int, logprob: float) -> dict[str, Any]:
        assert self._model is not None
        text = self._model.token_text(token)
        whole = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": finite(logprob), "bytes": whole}


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call_id(call), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


_CHUNK = "chat.completion.chunk"


def finite(logprob: float) -> float:
    """JSON has no infinity; -9999 is OpenAI's word for what is not possible at all."""
    return max(logprob, -9999.0)


def usage(results: Any) -> dict[str, Any]:
    """What answers took, in tokens. A prompt that is answered several times counts once."""
    found = list(results)
    prompt = found[0].prompt_tokens if found else 0
    completion = sum(len(result.tokens) for result in found)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": found[0].reused_tokens if found else 0},
    }
