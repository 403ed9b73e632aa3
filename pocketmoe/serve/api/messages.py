"""Anthropic's messages: /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from pocketmoe.runtime.answer import StopReason
from pocketmoe.runtime.conversation import Generation
from pocketmoe.runtime.model import Model
from pocketmoe.serve.api.decoding import decode
from pocketmoe.serve.api.errors import refused, translated
from pocketmoe.serve.api.sampling import ModelName, Share, StopString, Tokens, event
from pocketmoe.serve.api.speech import (
    Function,
    FunctionName,
    Name,
    call_id,
    refuse_loose_results,
    tool_options,
)
from pocketmoe.serve.api.work import Choice, Event, Piece, Progress, Question, Scored, Work
from pocketmoe.tools.calls import Part, ToolCall
from pocketmoe.tools.families import Dialect

_STOP: dict[StopReason, str] = {
    "eos": "end_turn",
    "complete": "end_turn",
    "length": "max_tokens",
    "context": "model_context_window_exceeded",
    "stop": "stop_sequence",
}


class CacheControl(Struct, forbid_unknown_fields=True):
    """A wish that a prefix be kept, which happens anyway."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Struct, forbid_unknown_fields=True, tag="text"):
    text: str
    cache_control: CacheControl | None = None
    citations: None = None


class ThinkingBlock(Struct, forbid_unknown_fields=True, tag="thinking"):
    """What the model thought before an earlier answer."""

    thinking: str
    signature: str | None = None


class ToolUseBlock(Struct, forbid_unknown_fields=True, tag="tool_use"):
    """A call of an earlier answer."""

    id: str
    name: Name
    input: dict[str, Any]
    cache_control: CacheControl | None = None


class ToolResultBlock(Struct, forbid_unknown_fields=True, tag="tool_result"):
    """What a call came to."""

    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


class MessageTool(Struct, forbid_unknown_fields=True):
    """What a model may call. `input_schema`: a JSON schema of an object."""

    name: Name
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    cache_control: CacheControl | None = None


class ToolChoice(Struct, forbid_unknown_fields=True):
    """Which tools are called; `name` goes with the type `tool`."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None


class Message(Struct, forbid_unknown_fields=True):
    """What was said, by whom."""

    role: Literal["user", "assistant"]
    content: str | Annotated[list[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock], Meta(min_length=1)]


class ThinkingOn(Struct, forbid_unknown_fields=True, tag="enabled"):
    budget_tokens: Tokens  # a target by the API's own words, no limit


class ThinkingAdaptive(Struct, forbid_unknown_fields=True, tag="adaptive"):
    """As the model sees fit."""


class ThinkingOff(Struct, forbid_unknown_fields=True, tag="disabled"):
    """An answer without reasoning."""


class Metadata(Struct, forbid_unknown_fields=True):
    user_id: str | None = None


class Conversation(Struct, kw_only=True, forbid_unknown_fields=True):
    """What both paths take."""

    model: ModelName
    messages: Annotated[list[Message], Meta(min_length=1, max_length=10_000)]
    system: str | list[TextBlock] | None = None
    thinking: ThinkingOn | ThinkingAdaptive | ThinkingOff | None = None
    tools: Annotated[list[MessageTool], Meta(max_length=512)] | None = None
    tool_choice: ToolChoice | None = None
    cache_control: CacheControl | None = None
    speed: Literal["standard"] | None = None
    # Of the API and not supported: there may be nothing in it.
    user_profile_id: None = None
    workspace_id: None = None
    context_management: None = None
    mcp_servers: Annotated[list[Any], Meta(max_length=0)] | None = None
    output_config: None = None
    output_format: None = None


class MessagesRequest(Conversation, kw_only=True, forbid_unknown_fields=True):
    """A conversation to be answered."""

    max_tokens: Tokens
    stop_sequences: Annotated[list[StopString], Meta(max_length=16)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    metadata: Metadata | None = None  # says who asks: nothing that an answer depends on
    service_tier: Literal["auto", "standard_only"] | None = None
    container: None = None  # these as the last fields of `Conversation`
    diagnostics: None = None
    inference_geo: None = None


def read(body: bytes) -> tuple[Work, MessagesReply]:
    """A request, and how it is answered. Raises ApiError."""
    request = decode(body, MessagesRequest)
    options: dict[str, Any] = {"authors": True, "max_tokens": request.max_tokens}
    given = {"temperature": request.temperature, "top_k": request.top_k, "top_p": request.top_p}
    options |= {name: value for name, value in given.items() if value is not None}
    options["stop"] = request.stop_sequences or []
    options |= _tool_options(request)
    variables = _variables(request)
    if variables:
        options["template"] = variables
    places = dict.fromkeys(variables, "thinking")
    work = Work(request.model, [_chat(request)], "messages", options, variables=places)
    return work, MessagesReply(request)


def count(body: bytes) -> Question:
    """How many tokens a conversation has. Raises ApiError."""
    request = decode(body, Conversation)
    messages, variables, tools = _chat(request), _variables(request), _tool_options(request).get("tools")

    def answer(model: Model) -> Any:
        given = {**variables, **({"tools": tools} if tools else {})}
        return {"input_tokens": len(model.prompt_ids(messages, template=given))}

    return Question(request.model, "messages", answer)


def _tool_options(request: Conversation) -> dict[str, Any]:
    """Options of `Model.stream`. Raises ApiError."""
    tools = [Function(tool.name, tool.description, tool.input_schema) for tool in request.tools or ()]
    choice = request.tool_choice
    if choice is None:
        return tool_options(tools, None, None)
    if (choice.type == "tool") != (choice.name is not None):
        raise refused("tool_choice.name", "'name' goes with the type 'tool', and only with it")
    wanted = FunctionName(choice.name) if choice.name else {"any": "required"}.get(choice.type, choice.type)
    several = None if choice.disable_parallel_tool_use is None else not choice.disable_parallel_tool_use
    return tool_options(tools, wanted, several)


def _variables(request: Conversation) -> dict[str, Any]:
    """What the template is told about thinking."""
    if request.thinking is None:
        return {}
    return {"enable_thinking": not isinstance(request.thinking, ThinkingOff)}


def _chat(request: Conversation) -> list[dict[str, Any]]:
    """The conversation as chat templates take it."""
    system = request.system
    if isinstance(system, list):
        system = "".join(block.text for block in system)
    chat: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for message in request.messages:
        content = message.content
        if isinstance(content, str):
            chat.append({"role": message.role, "content": content})
            continue
        chat += _said(message.role, content)
    refuse_loose_results(chat, "messages")
    if chat[-1]["role"] == "assistant":
        raise refused(
            "messages", "an answer cannot be begun for the model: the conversation has to end with a user's message"
        )
    return chat


def _said(role: str, content: list[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock]) -> list[dict[str, Any]]:
    """One message's blocks: results of calls come first, each as a message of its own."""
    found: list[dict[str, Any]] = []
    for block in content:
        if isinstance(block, ToolResultBlock):
            given = block.content or ""
            text = given if isinstance(given, str) else "".join(part.text for part in given)
            found.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": text})
    text = "".join(block.text for block in content if isinstance(block, TextBlock))
    thought = "".join(block.thinking for block in content if isinstance(block, ThinkingBlock))
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": json.dumps(block.input)}}
        for block in content
        if isinstance(block, ToolUseBlock)
    ]
    if text or calls or thought or not found:
        more: dict[str, Any] = {"reasoning_content": thought, "tool_calls": calls}
        found.append({"role": role, "content": text, **{name: value for name, value in more.items() if value}})
    return found


class MessagesReply:
    """Tells an answer as a message, or as the events of one."""

    def __init__(self, request: MessagesRequest) -> None:
        self.streams = bool(request.stream)
        self._name, self._stops = request.model, request.stop_sequences or []
        self._model: Model | None = None
        self._id = f"msg_{uuid.uuid4().hex[:24]}"
        self.blocks: list[dict[str, Any]] = []  # of the answer so far
        self._parser = Dialect().parser()  # until it begins
        self._result: Generation | None = None
        self._prompt_tokens = 0

    def begin(self, model: Model, choices: Sequence[Choice]) -> Iterator[bytes]:
        (choice,) = choices
        self._model = model
        self._prompt_tokens = choice.prompt_tokens
        self._parser = choice.parser
        yield _event("message_start", message={**self._message(), "usage": self._usage(0)})

    def push(self, event: Event) -> Iterator[bytes]:
        if isinstance(event, Progress):
            yield f": prompt {event.done}/{event.total}\n\n".encode()
        elif isinstance(event, Piece):
            yield from self._tell(self._parser.push(event.text))
        elif not isinstance(event, Scored):
            yield from self._tell(self._parser.finish())
            self._result = event.result

    def end(self) -> Iterator[bytes]:
        assert self._result is not None
        if not self.blocks:
            yield from self._open("text")
        yield _event("content_block_stop", index=len(self.blocks) - 1)
        delta = self._why(self._result)
        yield _event("message_delta", delta=delta, usage=self._usage(len(self._result.tokens)))
        yield _event("message_stop")

    def whole(self) -> dict[str, Any]:
        assert self._result is not None
        return {
            **self._message(),
            "content": self.blocks or [{"type": "text", "text": ""}],
            **self._why(self._result),
            "usage": self._usage(len(self._result.tokens)),
        }

    def failed(self, error: Exception) -> bytes:
        return event(translated(error).body("anthropic"), "error")

    def _why(self, result: Generation) -> dict[str, str | None]:
        """Why it ended, and before which stop sequence: the longest that the tokens go on with."""
        found = None
        if result.stop_reason == "stop" and self._model:
            rest = self._model.detokenize(result.tokens)[len(result.text) :]
            found = max((stop for stop in self._stops if rest.startswith(stop)), key=len, default=None)
        why = _STOP.get(result.stop_reason)
        if why == "end_turn" and any(block["type"] == "tool_use" for block in self.blocks):
            why = "tool_use"
        return {"stop_reason": why, "stop_sequence": found}

    def _tell(self, parts: list[Part]) -> Iterator[bytes]:
        for part in parts:
            if isinstance(part, ToolCall):
                yield from self._tell_call(part)
                continue
            kind = "thinking" if part.kind == "reasoning" else "text"
            if not self.blocks or self.blocks[-1]["type"] != kind:
                yield from self._open(kind)
            self.blocks[-1][kind] += part.text
            delta = {"type": f"{kind}_delta", kind: part.text}
            yield _event("content_block_delta", index=len(self.blocks) - 1, delta=delta)

    def _tell_call(self, call: ToolCall) -> Iterator[bytes]:
        yield from self._begin({"type": "tool_use", "id": call_id(call), "name": call.name, "input": {}})
        self.blocks[-1]["input"] = json.loads(call.arguments)
        delta = {"type": "input_json_delta", "partial_json": call.arguments}
        yield _event("content_block_delta", index=len(self.blocks) - 1, delta=delta)

    def _open(self, kind: str) -> Iterator[bytes]:
        yield from self._begin({"type": kind, kind: "", **({"signature": ""} if kind == "thinking" else {})})

    def _begin(self, block: dict[str, Any]) -> Iterator[bytes]:
        if self.blocks:
            yield _event("content_block_stop", index=len(self.blocks) - 1)
        yield _event("content_block_start", index=len(self.blocks), content_block=block)
        self.blocks.append(dict(block))

    def _message(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }

    def _usage(self, answer_tokens: int) -> dict[str, int]:
        return {"input_tokens": self._prompt_tokens, "output_tokens": answer_tokens}


def _event(name: str, **fields: Any) -> bytes:
    return event({"type": name, **fields}, name)
