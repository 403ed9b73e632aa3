"""OpenAI's responses: the same answers as chat completions give, told as items, whole or in events."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pocketmoe.serve.api import chat, responses
from pocketmoe.serve.api.errors import ApiError
from pocketmoe.serve.api.responses_reply import ResponsesReply
from pocketmoe.serve.api.work import Choice, Piece
from pocketmoe.tools.calls import read_tools
from pocketmoe.tools.families import dialect
from tests.serve.client import Answer, Running
from tests.serve.test_refusals import refusal

PATH = "/v1/responses"
UNIT = {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}, "required": ["unit"]}
HELD = {**UNIT, "additionalProperties": False}
TOOLS = [{"type": "function", "name": name, "parameters": HELD} for name in ("weather", "sea")]
TEMPLATE = "{{ tools }}<tool_call></tool_call><think></think>"


def asked(**more: Any) -> dict[str, Any]:
    return {"model": "speaker", "input": "hello", "max_output_tokens": 20, "temperature": 0, **more}


def assembled(answer: Answer) -> dict[str, Any]:
    """The response that a stream's events make, by the rules of OpenAI's clients."""
    events = answer.events
    names = [line[7:] for line in answer.body.decode().split("\n") if line.startswith("event: ")]
    assert names == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    assert names[:2] == ["response.created", "response.in_progress"]
    output: list[dict[str, Any]] = []
    for event in events[2:-1]:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(output)
            output.append(event["item"])
            continue
        item = output[event["output_index"]]
        assert event.get("item_id", item["id"]) == item["id"]
        if kind == "content_part.added":
            item["content"].append(event["part"])
        elif kind in ("output_text.delta", "reasoning_text.delta"):
            item["content"][event["content_index"]]["text"] += event["delta"]
        elif kind == "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        elif kind == "function_call_arguments.done":
            assert (item["arguments"], item["name"]) == (event["arguments"], event["name"])
        elif kind in ("output_text.done", "reasoning_text.done"):
            assert item["content"][event["content_index"]]["text"] == event["text"]
        elif kind == "content_part.done":
            assert item["content"][event["content_index"]] == event["part"]
        else:
            assert kind == "output_item.done"
            assert {**item, "status": event["item"]["status"]} == event["item"]
            item["status"] = event["item"]["status"]
    response = events[-1]["response"]
    assert events[-1]["type"] == f"response.{response['status']}"
    assert response["output"] == output
    return response


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    output = [{**item, "id": 0, "call_id": 0} for item in response["output"]]
    return {**response, "output": output, "id": 0, "created_at": 0, "completed_at": 0}


FORM = {"format": {"type": "json_schema", "name": "u", "schema": HELD}}
CHAT_FORM = {"type": "json_schema", "json_schema": {"name": "u", "schema": HELD}}
CHAT_TOOLS = [{"type": "function", "function": {"name": tool["name"], "parameters": HELD}} for tool in TOOLS]
NAMED = {"type": "function", "name": "sea"}, {"type": "function", "function": {"name": "sea"}}
SAID = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize(
    ("fields", "as_chat"),
    [
        ({}, {}),
        ({"instructions": "be brief"}, {"messages": [{"role": "system", "content": "be brief"}, *SAID["messages"]]}),
        ({"text": FORM}, {"response_format": CHAT_FORM}),
        ({"tools": TOOLS, "tool_choice": "required"}, {"tools": CHAT_TOOLS, "tool_choice": "required"}),
        ({"tools": TOOLS, "tool_choice": NAMED[0], "parallel_tool_calls": False},
         {"tools": CHAT_TOOLS, "tool_choice": NAMED[1], "parallel_tool_calls": False}),
        ({"tools": TOOLS, "tool_choice": "none"}, {"tools": CHAT_TOOLS, "tool_choice": "none"}),
        ({"tools": TOOLS, "text": FORM}, {"tools": CHAT_TOOLS, "response_format": CHAT_FORM}),
    ],
)  # fmt: skip
def test_a_response_is_the_chat_completion(speaking: Running, fields: dict[str, Any], as_chat: dict[str, Any]) -> None:
    """Text, calls, why it ended, and usage; streamed it is the same response, item by item."""
    body = asked(max_output_tokens=120, **fields)
    whole = speaking.post(PATH, body).json
    other = {"model": "speaker", "max_tokens": 120, "temperature": 0, **SAID, **as_chat}
    answer = speaking.post("/v1/chat/completions", other).json
    assert "choices" in answer, (answer, speaking.lines[-3:])
    (choice,) = answer["choices"]
    message = choice["message"]
    text = "".join(item["content"][0]["text"] for item in whole["output"] if item["type"] == "message")
    assert text == (message["content"] or "")
    calls = [(item["name"], item["arguments"]) for item in whole["output"] if item["type"] == "function_call"]
    expected = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    assert calls == expected
    assert (whole["status"] == "incomplete") == (choice["finish_reason"] == "length")
    usage = {name: whole["usage"][name] for name in ("input_tokens", "output_tokens", "total_tokens")}
    assert [*usage.values()] == [
        answer["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")
    ]
    streamed = assembled(speaking.post(PATH, {**body, "stream": True}))
    for response in (whole, streamed):  # of a prompt that is asked again more is known
        response["usage"].pop("input_tokens_details")
    assert without_ids(streamed) == without_ids(whole)


def test_what_is_forced_is_what_was_asked_for(speaking: Running) -> None:
    """A named tool is called, with arguments of its schema; text of a schema keeps to it; both name what they are."""
    named = {"tools": TOOLS, "tool_choice": {"type": "function", "name": "sea"}, "parallel_tool_calls": False}
    found = speaking.post(PATH, asked(max_output_tokens=200, **named)).json
    (call,) = found["output"]
    assert (call["type"], call["name"], found["status"]) == ("function_call", "sea", "completed")
    assert json.loads(call["arguments"])["unit"] in ("C", "F")
    held = speaking.post(PATH, asked(max_output_tokens=200, text=FORM)).json
    assert json.loads(held["output"][0]["content"][0]["text"])["unit"] in ("C", "F")
    assert held["text"]["format"]["schema"] == HELD


CALL = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"unit": "C"}'}
OTHER_CALL = {**CALL, "call_id": "c2", "name": "sea", "id": "fc_2", "status": "completed"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "12"}
OTHER_OUTPUT = {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "7"}]}
USER = {"role": "user", "content": "hello"}


def chat_call(item: dict[str, Any]) -> dict[str, Any]:
    function = {"name": item["name"], "arguments": item["arguments"]}
    return {"id": item["call_id"], "type": "function", "function": function}


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        ("hello", [USER]),
        ([USER, {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "b"}]}],
         [USER, {"role": "developer", "content": "b"}]),
        ([USER, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
         [USER, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]),
        ([USER, CALL, OTHER_CALL, OUTPUT, OTHER_OUTPUT],
         [USER, {"role": "assistant", "content": "", "tool_calls": [chat_call(CALL), chat_call(OTHER_CALL)]},
          {"role": "tool", "tool_call_id": "c1", "content": "12"},
          {"role": "tool", "tool_call_id": "c2", "content": "7"}]),
        ([USER, {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "so"}]},
          {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
           "content": [{"type": "output_text", "text": "see", "annotations": [], "logprobs": []}]}, CALL, OUTPUT],
         [USER, {"role": "assistant", "content": "see", "reasoning_content": "so", "tool_calls": [chat_call(CALL)]},
          {"role": "tool", "tool_call_id": "c1", "content": "12"}]),
        ([USER, CALL, {"role": "assistant", "content": "see"}, OUTPUT],
         [USER, {"role": "assistant", "content": "see", "tool_calls": [chat_call(CALL)]},
          {"role": "tool", "tool_call_id": "c1", "content": "12"}]),
    ],
)  # fmt: skip
def test_items_are_the_messages_of_a_chat(items: Any, messages: list[dict[str, Any]]) -> None:
    """Reasoning, text and calls of one answer are one message, as chat templates have it."""
    said, _ = responses.read(json.dumps(asked(input=items)).encode())
    told, _ = chat.read(json.dumps({"model": "speaker", "messages": messages}).encode())
    assert [*said.prompts[0]] == [*told.prompts[0]]


def test_reasoning_text_and_calls_are_items() -> None:
    """In the order in which they come, however the answer is cut into pieces; tokens of reasoning are counted."""
    text = 'so it is</think>\n\nsee\n<tool_call>\n{"name": "sea", "arguments": {"unit": "C"}}\n</tool_call>'
    tools = read_tools([{"type": "function", "function": {"name": "sea", "parameters": HELD}}])
    for step in (1, 4, len(text)):
        reply = ResponsesReply(True, {})
        sent = [*reply.begin(None, [Choice(0, 3, dialect(TEMPLATE).parser(tools, begun=True))])]  # type: ignore[arg-type]
        for at in range(0, len(text), step):
            sent += reply.push(Piece(0, text[at : at + step], (1,), ()))
        sent += reply.end()
        output = assembled(Answer(200, {}, b"".join(sent)))["output"]
        assert [item["type"] for item in output] == ["reasoning", "message", "function_call"]
        assert [item["content"][0]["text"].strip() for item in output[:2]] == ["so it is", "see"]
        assert (output[2]["name"], json.loads(output[2]["arguments"])) == ("sea", {"unit": "C"})


def test_tokens_are_counted_before(speaking: Running) -> None:
    """As they are counted after."""
    for fields in ({}, {"instructions": "be brief"}, {"tools": TOOLS}):
        counted = speaking.post(f"{PATH}/input_tokens", {"model": "speaker", "input": "hello", **fields}).json
        whole = speaking.post(PATH, asked(max_output_tokens=1, **fields)).json
        assert counted == {"object": "response.input_tokens", "input_tokens": whole["usage"]["input_tokens"]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"conversation": {"id": "conv_1"}}, "conversation"),
        ({"background": True}, "background"),
        ({"store": True}, "store"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tool_calls": 2}, "max_tool_calls"),
        ({"text": {"verbosity": "high"}}, "text.verbosity"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "schema": {"uniqueItems": True}}}}, "text.format"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "tide"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"stream_options": {}}, "stream_options"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]},
         "input[0].content[0].type"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input[0].role"),
        ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, "input[0].encrypted_content"),
        ({"input": [USER, OUTPUT]}, "input"),
        ({"input": [USER, CALL]}, "input"),
        ({"input": [USER, CALL, OTHER_OUTPUT]}, "input"),
        ({"input": [USER, CALL, OUTPUT, OUTPUT]}, "input"),
        ({"input": [USER, CALL, USER, OUTPUT]}, "input"),
    ],
)  # fmt: skip
def test_what_is_not_kept_or_cannot_be_meant_is_refused(fields: dict[str, Any], param: str) -> None:
    """By the field's name."""
    with pytest.raises(ApiError) as caught:
        responses.read(json.dumps(asked(**fields)).encode())
    assert (caught.value.status, (caught.value.param or "")[: len(param)]) == (400, param)


def test_effort_is_the_templates(speaking: Running, server: Running) -> None:
    """A template that knows the word is told of it, in both APIs; for any other the field is refused."""
    tokens = [
        speaking.post(PATH, asked(max_output_tokens=1, reasoning=reasoning)).json["usage"]["input_tokens"]
        for reasoning in (None, {"effort": "low"})
    ]
    assert tokens[1] == tokens[0] + len("low")
    said = {"model": "small", "messages": [USER], "max_tokens": 1, "reasoning_effort": "low"}
    for path, body, param in (
        (PATH, {**asked(reasoning={"effort": "low"}), "model": "small"}, "reasoning.effort"),
        ("/v1/chat/completions", said, "reasoning_effort"),
    ):
        answer = server.post(path, body)
        assert refusal(answer)[0] == 400
        assert answer.json["error"]["param"] == param
    assert speaking.post("/v1/chat/completions", {**said, "model": "speaker"}).status == 200


def test_stored_responses_are_not_there(speaking: Running) -> None:
    """Whoever asks for one gets the API's own error."""
    for method, path in (("GET", f"{PATH}/resp_1"), ("DELETE", f"{PATH}/resp_1"), ("POST", f"{PATH}/resp_1/cancel")):
        answer = speaking.send(method, path, b"{}", {"content-type": "application/json"})
        assert refusal(answer)[0] == 404
