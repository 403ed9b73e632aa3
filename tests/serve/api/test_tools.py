"""Calls of tools through both APIs: what a client sends, what the model is told, and what comes back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pocketmoe.serve.api import chat, messages
from pocketmoe.serve.api.errors import ApiError
from pocketmoe.serve.api.work import Choice, Piece
from pocketmoe.tools.calls import read_tools
from pocketmoe.tools.families import dialect
from tests.serve.client import Answer, Running

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "now", "parameters": SCHEMA}}
HERMES = "{% for tool in tools %}{{ tool }}{% endfor %}<tool_call></tool_call>"
SPOKEN = 'let me see\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}


def pieces() -> list[str]:
    return [SPOKEN[start : start + 5] for start in range(0, len(SPOKEN), 5)]


def choice() -> Choice:
    return Choice(0, 3, dialect(HERMES).parser(read_tools([TOOL])))


def test_tools_and_past_calls_reach_the_model() -> None:
    """Both APIs say the same to it: tools, who is to be called, what was called and what that came to."""
    body = {
        "model": "m",
        "messages": [
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        ],
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "parallel_tool_calls": False,
    }
    asked, _ = chat.read(json.dumps(body).encode())
    used = {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Bern"}}
    other = {
        "model": "m",
        "max_tokens": 9,
        "messages": [
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "content": [used]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1", "content": "sunny"}]},
        ],
        "tools": [{"name": "weather", "description": "now", "input_schema": SCHEMA}],
        "tool_choice": {"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
    }  # fmt: skip
    said, _ = messages.read(json.dumps(other).encode())
    for name in ("tools", "tool_choice", "parallel_tool_calls"):
        assert asked.options[name] == said.options[name]
    assert asked.options["tools"] == [TOOL]
    assert asked.options["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    told: Any = [*asked.prompts[0]]
    assert told[1]["tool_calls"] == [CALL]
    assert [{"content": "", **message} for message in told] == [*said.prompts[0]]


def test_a_chat_answer_has_its_calls() -> None:
    """Streamed as one delta for each call, and not as text."""
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}], "tools": [TOOL], "stream": True}
    _, reply = chat.read(json.dumps(body).encode())
    sent = [*reply.begin(None, [choice()])]  # type: ignore[arg-type]
    for piece in pieces():
        sent += reply.push(Piece(0, piece, (), ()))
    deltas = [event["choices"][0]["delta"] for event in Answer(200, {}, b"".join(sent)).events]
    assert "".join(delta.get("content", "") for delta in deltas).strip() == "let me see"
    (calls,) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert calls == [{**CALL, "index": 0, "id": calls[0]["id"]}]


def test_a_message_has_its_calls_as_blocks() -> None:
    """With the arguments as JSON in pieces, by the rules of Anthropic's clients."""
    body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "a"}], "stream": True}
    _, reply = messages.read(json.dumps(body).encode())
    sent = [*reply.begin(None, [choice()])]  # type: ignore[arg-type]
    for piece in pieces():
        sent += reply.push(Piece(0, piece, (), ()))
    *_, text, call = reply.blocks
    assert text["text"].strip() == "let me see"
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "weather", {"city": "Bern"})
    events = Answer(200, {}, b"".join(sent)).events
    parts = [
        event["delta"]["partial_json"] for event in events if event.get("delta", {}).get("type") == "input_json_delta"
    ]
    assert json.loads("".join(parts)) == {"city": "Bern"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
        ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any], param: str) -> None:
    """With the field's name."""
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}], **fields}
    with pytest.raises(ApiError) as caught:
        chat.read(json.dumps(body).encode())
    assert caught.value.status == 400
    assert (caught.value.param or "").startswith(param)


def test_a_model_whose_template_knows_no_tools_says_so(server: Running) -> None:
    """It is refused; nothing is left out in silence."""
    body = {"model": "small", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "tools": [TOOL]}
    refused = server.post("/v1/chat/completions", body)
    assert refused.status == 400
    assert "knows no tools" in refused.json["error"]["message"]


SURE = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {
            "messages": [{"role": "user", "content": "a"}], "max_tokens": 300,
            "tools": [{"type": "function", "function": {"name": "f", "parameters": SURE}}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
        }),
        ("/v1/messages", {
            "messages": [{"role": "user", "content": "a"}], "max_tokens": 300,
            "tools": [{"name": "f", "input_schema": SURE}], "tool_choice": {"type": "tool", "name": "f"},
        }),
        ("/v1/responses", {
            "input": "a", "max_output_tokens": 300, "tools": [{"type": "function", "name": "f", "parameters": SURE}],
            "tool_choice": {"type": "function", "name": "f"},
        }),
    ],
)  # fmt: skip
def test_a_tool_that_is_named_is_called_once(speaking: Running, path: str, fields: dict[str, Any]) -> None:
    """Also by a model that would go on calling it; the answer is whole."""
    answer = speaking.post(path, {**fields, "model": "speaker"}).json
    if path == "/v1/chat/completions":
        (told,) = answer["choices"]
        found, whole = told["message"]["tool_calls"], told["finish_reason"] == "tool_calls"
    else:
        found = answer.get("content") or answer["output"]
        whole = "tool_use" in answer.get("stop_reason", "tool_use") and answer.get("status") in (None, "completed")
    assert len(found) == 1
    assert whole
