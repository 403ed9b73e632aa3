"""OpenAI's responses: /v1/responses and /v1/responses/input_tokens. Nothing is kept: a conversation comes whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, to_builtins

from pocketmoe.jsonfile import is_array, is_object
from pocketmoe.runtime.model import Model
from pocketmoe.serve.api.decoding import decode
from pocketmoe.serve.api.errors import refused, unsupported
from pocketmoe.serve.api.responses_reply import ResponsesReply
from pocketmoe.serve.api.sampling import ModelName, Share, Tokens
from pocketmoe.serve.api.speech import (
    Effort,
    Function,
    FunctionName,
    Name,
    held_schema,
    refuse_loose_results,
    tool_options,
)
from pocketmoe.serve.api.work import Question, Work

Status = Literal["in_progress", "completed", "incomplete"]
ItemId = Annotated[str, Meta(max_length=256)]


class InputText(Struct, forbid_unknown_fields=True, tag="input_text"):
    text: str


class OutputText(Struct, forbid_unknown_fields=True, tag="output_text"):
    """Text of an earlier answer."""

    text: str
    annotations: Annotated[list[dict[str, Any]], Meta(max_length=0)] | None = None
    logprobs: Annotated[list[dict[str, Any]], Meta(max_length=0)] | None = None


class InputMessage(Struct, forbid_unknown_fields=True, tag="message"):
    """What was said, by whom. The type may be left out."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[InputText | OutputText], Meta(min_length=1)]
    id: ItemId | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCall(Struct, forbid_unknown_fields=True, tag="function_call"):
    """A call of an earlier answer."""

    call_id: str
    name: Name
    arguments: str
    id: ItemId | None = None
    status: Status | None = None


class FunctionCallOutput(Struct, forbid_unknown_fields=True, tag="function_call_output"):
    """What a call came to."""

    call_id: str
    output: str | list[InputText]
    id: ItemId | None = None
    status: Status | None = None


class ReasoningText(Struct, forbid_unknown_fields=True, tag="reasoning_text"):
    text: str


class SummaryText(Struct, forbid_unknown_fields=True, tag="summary_text"):
    text: str


class ReasoningItem(Struct, forbid_unknown_fields=True, tag="reasoning"):
    """What the model thought before an earlier answer."""

    summary: list[SummaryText] = []
    content: list[ReasoningText] | None = None
    encrypted_content: None = None  # another server's secret
    id: ItemId | None = None
    status: Status | None = None


Item = InputMessage | FunctionCall | FunctionCallOutput | ReasoningItem


class ResponseTool(Struct, forbid_unknown_fields=True, tag="function"):
    """What a model may call. `parameters`: a JSON schema of an object."""

    name: Name
    parameters: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseToolName(Struct, forbid_unknown_fields=True, tag="function"):
    name: Name


class PlainFormat(Struct, forbid_unknown_fields=True, tag="text"):
    """Any text."""


class ObjectFormat(Struct, forbid_unknown_fields=True, tag="json_object"):
    """A JSON object."""


class HeldFormat(Struct, forbid_unknown_fields=True, tag="json_schema"):
    """JSON that keeps to a schema."""

    schema: dict[str, Any]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None  # the schema is held either way


class TextOptions(Struct, forbid_unknown_fields=True):
    format: PlainFormat | ObjectFormat | HeldFormat | None = None
    verbosity: Literal["medium"] | None = None  # as the model does it


class ReasoningOptions(Struct, forbid_unknown_fields=True):
    effort: Effort | None = None
    summary: Literal["auto"] | None = None  # as the model does it: the reasoning itself is given


class StreamOptions(Struct, forbid_unknown_fields=True):
    include_obfuscation: bool | None = None


class ResponseInput(Struct, kw_only=True, forbid_unknown_fields=True):
    """What both paths take."""

    model: ModelName
    input: Annotated[str, Meta(min_length=1)] | Annotated[list[Item], Meta(min_length=1, max_length=10_000)]
    instructions: str | None = None
    tools: Annotated[list[ResponseTool], Meta(max_length=512)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolName | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    truncation: Literal["disabled"] | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None


class ResponsesRequest(ResponseInput, kw_only=True, forbid_unknown_fields=True):
    """A conversation to be answered."""

    max_output_tokens: Tokens | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Share | None = None
    store: bool | None = None  # True is the API's default, and refused where it is said
    background: bool | None = None
    # The reasoning comes as text, so there is nothing that would have to be encrypted to be sent back.
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None
    user: str | None = None  # these say who asks: nothing that an answer depends on, and nothing is kept of them
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Of the API and not supported: there may be nothing in it.
    top_logprobs: Annotated[int, Meta(ge=0, le=0)] | None = None
    max_tool_calls: None = None
    prompt: None = None
    prompt_cache_retention: None = None
    prompt_cache_options: None = None
    context_management: None = None
    access_programs: None = None
    background_options: None = None
    image: None = None
    moderation: None = None


def read(body: bytes) -> tuple[Work, ResponsesReply]:
    """A request, and how it is answered. Raises ApiError."""
    request = decode(body, ResponsesRequest, _typed)
    if request.background:
        raise unsupported("background", "'background' is not supported: an answer lasts as long as its connection")
    if request.store:
        raise unsupported("store", "'store' is not supported: this server keeps nothing")
    if request.stream_options is not None and not request.stream:
        raise refused("stream_options", "'stream_options' goes with 'stream' alone")
    if request.stream_options and request.stream_options.include_obfuscation:
        raise unsupported("stream_options.include_obfuscation")
    options: dict[str, Any] = {"authors": True, "max_tokens": request.max_output_tokens}
    given = {"temperature": request.temperature, "top_p": request.top_p}
    options |= {name: value for name, value in given.items() if value is not None}
    if (schema := _schema(request.text)) is not None:
        options["json_schema"] = schema
    options |= _tool_options(request)
    chat, variables = _chat(request), _variables(request)
    if variables:
        options["template"] = variables
    places = dict.fromkeys(variables, "reasoning.effort")
    work = Work(request.model, [chat], "input", options, variables=places)
    return work, ResponsesReply(bool(request.stream), _told_again(request))


def count(body: bytes) -> Question:
    """How many tokens a conversation has. Raises ApiError."""
    request = decode(body, ResponseInput, _typed)
    chat, variables, tools = _chat(request), _variables(request), _tool_options(request).get("tools")

    def answer(model: Model) -> Any:
        given = {**variables, **({"tools": tools} if tools else {})}
        return {"object": "response.input_tokens", "input_tokens": len(model.prompt_ids(chat, template=given))}

    return Question(request.model, "input", answer)


def _told_again(request: ResponsesRequest) -> dict[str, Any]:
    """What of a request its answer has too."""
    text = request.text or TextOptions()
    return {
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "model": request.model,
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "reasoning": to_builtins(request.reasoning or ReasoningOptions()),
        "temperature": request.temperature,
        "text": {"format": to_builtins(text.format or PlainFormat())},
        "tool_choice": to_builtins(request.tool_choice or "auto"),
        "tools": to_builtins(request.tools or []),
        "top_p": request.top_p,
    }


def _typed(body: Any) -> None:
    """A message may leave out its type: it gets it here."""
    items = body.get("input") if is_object(body) else None
    for item in items if is_array(items) else ():
        if is_object(item) and "role" in item:
            item.setdefault("type", "message")


def _tool_options(request: ResponseInput) -> dict[str, Any]:
    """Options of `Model.stream`. Raises ApiError."""
    tools = [Function(tool.name, tool.description, tool.parameters, tool.strict) for tool in request.tools or ()]
    choice = request.tool_choice
    wanted = FunctionName(choice.name) if isinstance(choice, ResponseToolName) else choice
    return tool_options(tools, wanted, request.parallel_tool_calls)


def _schema(text: TextOptions | None) -> dict[str, Any] | None:
    """What the answer is held to. Raises ApiError for a schema that cannot be held."""
    wanted = text.format if text else None
    if wanted is None or isinstance(wanted, PlainFormat):
        return None
    schema = {"type": "object"} if isinstance(wanted, ObjectFormat) else wanted.schema
    return held_schema(schema, "text.format")


def _variables(request: ResponseInput) -> dict[str, Any]:
    """What the template is told about thinking."""
    effort = request.reasoning.effort if request.reasoning else None
    return {} if effort is None else {"reasoning_effort": effort}


def _chat(request: ResponseInput) -> list[dict[str, Any]]:
    """The conversation as chat templates take it. Raises ApiError for what would have been kept, and loose calls."""
    for name in ("previous_response_id", "conversation"):
        if getattr(request, name) is not None:
            raise unsupported(name, f"'{name}' is not supported: this server keeps nothing; send all as 'input'")
    chat: list[dict[str, Any]] = []
    if request.instructions:
        chat.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*chat, {"role": "user", "content": request.input}]
    for item in request.input:
        _add(chat, item)
    refuse_loose_results(chat, "input")
    return chat


def _add(chat: list[dict[str, Any]], item: Item) -> None:
    """An item is a message, or a part of the answer before it: reasoning, text and calls of one are one message."""
    if isinstance(item, FunctionCallOutput):
        chat.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
    elif isinstance(item, FunctionCall):
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        _answer(chat).setdefault("tool_calls", []).append(call)
    elif isinstance(item, ReasoningItem):
        thought = _text(item.content or item.summary)
        if thought:
            answer = {"role": "assistant", "content": "", "reasoning_content": thought}
            chat.append(answer)
    elif item.role == "assistant" and chat and chat[-1]["role"] == "assistant" and _is_open(chat[-1]):
        chat[-1]["content"] += _text(item.content)
    else:
        role = "system" if item.role == "developer" else item.role
        chat.append({"role": role, "content": _text(item.content)})


def _answer(chat: list[dict[str, Any]]) -> dict[str, Any]:
    """The answer at the end of a conversation, which may be a new one."""
    if not chat or chat[-1]["role"] != "assistant":
        chat.append({"role": "assistant", "content": ""})
    return chat[-1]


def _is_open(answer: dict[str, Any]) -> bool:
    """Whether text that follows belongs to it: after reasoning, or between calls and their results."""
    return "tool_calls" in answer or not answer["content"]


def _text(content: str | Sequence[InputText | OutputText | ReasoningText | SummaryText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
