"""What a client can send that is no request: it gets the API's own error, and the server goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketmoe.errors import BadInput
from pocketmoe.serve.api import chat, completions, messages, responses, tokens
from pocketmoe.serve.api.decoding import MOST_DEPTH
from pocketmoe.serve.api.errors import ApiError
from pocketmoe.serve.service import about_model
from tests.serve.client import Answer, Running

CHAT = {"model": "small", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
MESSAGE = {**CHAT, "max_tokens": 2}
COMPLETION = {"model": "small", "prompt": "a", "max_tokens": 2}
RESPONSE = {"model": "small", "input": [{"role": "user", "content": "a"}], "max_output_tokens": 2}
GOOD = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/messages": MESSAGE,
    "/v1/responses": RESPONSE,
}
READERS: dict[Any, dict[str, Any]] = {
    chat.read: CHAT,
    completions.read: COMPLETION,
    responses.read: RESPONSE,
    responses.count: {"model": "small", "input": "a"},
    messages.read: MESSAGE,
    messages.count: {"model": "small", "messages": CHAT["messages"]},
    tokens.tokenize: {"model": "small", "prompt": "a"},
    tokens.detokenize: {"model": "small", "tokens": [1]},
}


def refusal(answer: Answer) -> tuple[int, str]:
    """The status, and what the error says; it is an error object of one of the APIs."""
    error = answer.json["error"]
    assert error["message"]
    assert error["type"]
    assert answer.headers["content-type"] == "application/json"
    return answer.status, error["message"]


def changed(path: str, **fields: Any) -> dict[str, Any]:
    return {**GOOD[path], **fields}


def test_a_bug_in_a_page_is_an_error_of_the_api_and_a_line_in_the_log(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 500, without what went wrong, which the log has; the server goes on."""

    def broken() -> str:
        raise ZeroDivisionError("a secret")

    with monkeypatch.context() as patched:
        patched.setattr("pocketmoe.serve.app.description", broken)
        status, message = refusal(server.get("/openapi.json"))
    assert status == 500
    assert "secret" not in message
    assert "ZeroDivisionError: a secret" in server.wait_for(event="failure")["error"]
    assert server.get("/openapi.json").status == 200


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"null", 400),
        (b"[]", 400),
        (b"\xff\xfe{}", 400),
        (b'{"model": "\xff"}', 400),
        (b'{"model": "\\ud800"}', 400),
        (b'{"temperature": NaN}', 400),
        (b'{"temperature": 1e999}', 400),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", 400),
        (b"[" * 100_000, 400),
        (b'{"a":' * 50_000, 400),
        (b"x" * ((256 << 10) + 1), 413),
    ],
    ids=lambda value: str(value)[:24],
)
def test_bodies_that_are_no_requests(server: Running, path: str, body: bytes, status: int) -> None:
    """Wrong JSON, wrong UTF-8, numbers that are none, deep nesting, too much of it."""
    assert refusal(server.post(path, body))[0] == status


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("/v1/chat/completions", {"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ("/v1/chat/completions", {"temperature": -1}, "temperature"),
        ("/v1/chat/completions", {"temperature": "hot"}, "temperature"),
        ("/v1/chat/completions", {"max_tokens": 0}, "max_tokens"),
        ("/v1/chat/completions", {"max_tokens": 2, "max_completion_tokens": 2}, "max_tokens"),
        ("/v1/chat/completions", {"n": 17}, "n"),
        ("/v1/chat/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("/v1/chat/completions", {"logit_bias": {"8": 1}}, "logit_bias"),
        ("/v1/chat/completions", {"logit_bias": {"x": 1}}, "logit_bias"),
        ("/v1/chat/completions", {"stop": [""]}, "stop"),
        ("/v1/chat/completions", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("/v1/chat/completions", {"functions": []}, "functions"),
        ("/v1/chat/completions", {"audio": {}}, "audio"),
        ("/v1/chat/completions", {"store": True}, "store"),
        ("/v1/chat/completions", {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ("/v1/chat/completions", {"chat_template_kwargs": {"loud": 1}}, "chat_template_kwargs.loud"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": ""}, "prompt"),
        ("/v1/completions", {"prompt": [[]]}, "prompt"),
        ("/v1/completions", {"prompt": [1, "a"]}, "prompt"),
        ("/v1/completions", {"prompt": [8]}, "prompt"),
        ("/v1/completions", {"prompt": [-1]}, "prompt"),
        ("/v1/completions", {"prompt": [1.5]}, "prompt"),
        ("/v1/completions", {"prompt": ["a"] * 50, "n": 3}, "n"),
        ("/v1/completions", {"max_tokens": 0}, "max_tokens"),
        ("/v1/completions", {"suffix": "b"}, "suffix"),
        ("/v1/completions", {"best_of": 2}, "best_of"),
    ],
)
def test_the_field_at_fault_is_named(server: Running, path: str, fields: dict[str, Any], param: str) -> None:
    """What is wrong or not supported is refused, and never ignored."""
    answer = server.post(path, changed(path, **fields))
    assert refusal(answer)[0] == 400
    assert answer.json["error"]["param"].startswith(param)


@pytest.mark.parametrize("path", GOOD)
def test_a_prompt_beyond_the_context_has_the_apis_code(server: Running, path: str) -> None:
    """Before any work; and one that just fits is answered."""
    for words, status in ((100, 400), (62, 200)):
        text = " ".join("abcdefgh"[i % 8] for i in range(words))
        said = [{"role": "user", "content": text}]
        (name,) = {"prompt", "messages", "input"} & {*GOOD[path]}
        prompt = {name: text if name == "prompt" else said}
        answer = server.post(path, changed(path, **prompt))
        assert answer.status == status
        if status == 400 and path != "/v1/messages":
            assert answer.json["error"]["code"] == "context_length_exceeded"
            assert "maximum context length is 64 tokens" in answer.json["error"]["message"]


def test_other_kinds_of_bodies(server: Running) -> None:
    """Only JSON is taken, uncompressed, by POST."""
    path, body = "/v1/completions", json.dumps(COMPLETION).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        assert refusal(server.send("POST", path, body, {"content-type": kind}))[0] == 415
    packed = {"content-type": "application/json", "content-encoding": "gzip"}
    assert refusal(server.send("POST", path, body, packed))[0] == 415
    assert server.send("POST", path, body, {"content-type": "Application/JSON; charset=utf-8"}).status == 200
    assert refusal(server.get(path))[0] == 405


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(data=st.data(), reader=st.sampled_from([*READERS]))
def test_whatever_json_there_is_it_is_read_or_refused(data: st.DataObject, reader: Any) -> None:
    """A field replaced, added or taken away, or bytes changed: a request, or an error that is the client's."""
    body = dict(READERS[reader])
    known = sorted({*body, "stop", "stream", "logit_bias", "system", "thinking", "n", "echo", "seed", "top_p"})
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(known) | st.text(max_size=6))
        if data.draw(st.booleans()):
            body[name] = data.draw(JSON)
        else:
            body.pop(name, None)
    sent = bytearray(json.dumps(body).encode())
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(sent) - 1))
        sent[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    refused: list[ApiError] = []
    try:
        reader(bytes(sent))
    except ApiError as error:
        refused.append(error)
    assert all(error.status == 400 for error in refused)
    assert all(error.body("openai")["error"]["message"] == error.message[:1000] for error in refused)
    assert all(json.loads(error.encoded("anthropic"))["type"] == "error" for error in refused)


@given(depth=st.integers(1, 3 * MOST_DEPTH), kind=st.sampled_from(["[]", "{}"]), text=st.text(max_size=20))
def test_depth_is_counted_and_brackets_in_texts_are_not(depth: int, kind: str, text: str) -> None:
    """A text with any brackets is as deep as the value it is in."""
    value: Any = "[{" * 100 + text + '"\\'
    for _ in range(depth):
        value = [value] if kind == "[]" else {"a": value}
    with pytest.raises(ApiError) as caught:
        chat.read(json.dumps({**CHAT, "logit_bias": value}).encode())
    assert ("deeper" in caught.value.message) == (depth + 1 > MOST_DEPTH)


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"garbage\r\n\r\n", 400, "invalid_http"),
        (b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: gzip\r\n\r\n", 400, "invalid_http"),
        (b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: +5\r\n\r\n", 400, "invalid_http"),
        (b"GET /v1/nothing HTTP/1.1\r\nhost: localhost\r\n\r\n", 404, "not_found"),
        (b"GET /v1/models/ HTTP/1.1\r\nhost: localhost\r\n\r\n", 404, "model_not_found"),
        (b"POST /v1/completions/ HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n", 404, "not_found"),
        (b"OPTIONS /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n", 405, "method_not_allowed"),
        (b"DELETE /v1/completions HTTP/1.1\r\nhost: localhost\r\n\r\n", 405, "method_not_allowed"),
        (b"GET /health HTTP/1.1\r\nhost: evil.example\r\n\r\n", 403, "host_not_allowed"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_never_comes_to_a_path_is_told_and_noted(server: Running, data: bytes, status: int, code: str) -> None:
    """By the API's error object, and by one line of the log."""
    server.lines.clear()
    head, _, body = server.raw(data.replace(b"localhost\r\n", b"localhost\r\nconnection: close\r\n", 1)).partition(
        b"\r\n\r\n"
    )
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert json.loads(body)["error"]["code"] == code
    assert (b"\r\nallow: " in head.lower()) == (status == 405)
    line = server.wait_for(event="request", status=status, code=code)
    assert len(line.get("path", "")) <= 200
    assert not server.lines


def said(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def called(arguments: str) -> list[dict[str, Any]]:
    """A conversation with a call of these arguments, and its result."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [said("a"), {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "b"}]  # fmt: skip


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [said([{"type": "image_url", "image_url": {"url": "data:"}}])]}, "messages[0].content[0].type"),
        ({"messages": [said([{"type": "input_audio"}])]}, "messages[0].content[0].type"),
        ({"messages": [said([])]}, "messages[0].content"),
        ({"messages": [said(None)]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "b"}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "b", "tool_call_id": "c"}]}, "messages"),
        ({"messages": called("{}")[:2]}, "messages"),
        ({"messages": [*called("{}")[:2], said("a")]}, "messages"),
        ({"messages": [*called("{}"), called("{}")[2]]}, "messages"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": 'a"b'}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"typical_p": 0}, "typical_p"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.0}, "max_tokens"),
        ({"max_tokens": 2**64}, "max_tokens"),
        ({"seed": 2**64}, "seed"),
        ({"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "low"}}, "reasoning_effort"),
    ],
)  # fmt: skip
def test_what_chats_cannot_mean_is_refused_by_name(speaking: Running, fields: dict[str, Any], param: str) -> None:
    """Parts that are not text, calls and results that do not fit, tools and forms that there are not, odd numbers."""
    answer = speaking.post("/v1/chat/completions", {**CHAT, "model": "speaker", **fields})
    assert refusal(answer)[0] == 400
    assert answer.json["error"]["param"] == param


@pytest.mark.parametrize(
    "fields",
    [
        *({"messages": called(text)} for text in ('{"a": "\\ud800"}', '{"a": NaN}', '{"a": 1e999}', '{"a', "[1]", "")),
        {"messages": [{"role": "developer", "content": "a"}, said("b", name="bob")]},
        {"messages": [said([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])]},
        {"messages": [said("\0 <tool_call>\n</tool_call><think>")]},
        {"tools": [TOOL], "tool_choice": "none"},
        {"tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": False},
        {"tools": [{"type": "function", "function": {"name": name}} for name in ("none", "auto", "required")],
         "tool_choice": {"type": "function", "function": {"name": "none"}}},
        {"temperature": 1e-320, "seed": -1},
        {"top_p": 5e-324, "temperature": 1},
        {"logit_bias": {str(token): -100 for token in range(256)}},
        {"n": 16, "stream": True, "temperature": 1},
        {"chat_template_kwargs": {"reasoning_effort": 10**30}},
    ],
)  # fmt: skip
def test_what_is_odd_and_can_be_meant_is_answered(speaking: Running, fields: dict[str, Any]) -> None:
    """Arguments of past calls that are no JSON stay the text that the model wrote; nothing is an error of ours."""
    speaking.lines.clear()
    answer = speaking.post("/v1/chat/completions", {**CHAT, "model": "speaker", **fields})
    assert answer.status == 200, answer.body
    assert not [line for line in speaking.lines if line["event"] != "request"]


NOTHING: list[tuple[str, dict[str, Any]]] = [
    ("/v1/responses", {"input": [{"type": "reasoning"}]}),
    ("/v1/responses", {"input": [{"type": "reasoning", "content": [], "encrypted_content": None}]}),
    ("/v1/messages", {"messages": [said("a"), {"role": "assistant", "content": "The sky is"}]}),
    ("/v1/messages/count_tokens", {"messages": [{"role": "assistant", "content": "a"}]}),
]


@pytest.mark.parametrize(("path", "fields"), NOTHING)
def test_a_conversation_without_a_question_is_refused(speaking: Running, path: str, fields: dict[str, Any]) -> None:
    """Nothing is said in it, or, where the API would go on with it, an answer is begun for the model."""
    answer = speaking.post(path, {**GOOD.get(path, {}), "model": "speaker", **fields})
    assert refusal(answer)[0] == 400


# All optional fields that the API's publishers describe.
OPTIONAL = {
    "/v1/chat/completions": """audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens
        metadata modalities n parallel_tool_calls prediction presence_penalty prompt_cache_key prompt_cache_retention
        reasoning_effort response_format safety_identifier seed service_tier stop store stream stream_options
        temperature tool_choice tools top_logprobs top_p user verbosity web_search_options moderation
        prompt_cache_options""",
    "/v1/completions": """best_of echo frequency_penalty logit_bias logprobs n presence_penalty seed stop stream
        stream_options suffix temperature top_p user""",
    "/v1/messages": """container context_management mcp_servers metadata output_config output_format service_tier
        stop_sequences stream system temperature thinking tool_choice tools top_k top_p cache_control diagnostics
        inference_geo speed user_profile_id workspace_id""",
    "/v1/responses": """background context_management conversation include instructions max_tool_calls metadata
        parallel_tool_calls previous_response_id prompt prompt_cache_key prompt_cache_retention reasoning
        safety_identifier service_tier store stream stream_options temperature text tool_choice tools top_logprobs top_p
        truncation user access_programs background_options image moderation prompt_cache_options""",
}


def text_of(answer: dict[str, Any]) -> str:
    """Of an answer by any of the APIs."""
    for choice in answer.get("choices", ()):
        return choice["text"] if "text" in choice else choice["message"]["content"]
    parts = answer["content"] if "content" in answer else answer["output"][-1]["content"]
    return "".join(part["text"] for part in parts)


@pytest.mark.parametrize("path", GOOD)
def test_a_field_without_a_value_is_one_that_is_left_out(speaking: Running, path: str) -> None:
    """Each of the API's own, supported or not; those that are not are refused by name once they have one."""
    names = OPTIONAL[path].split()
    plain = speaking.post(path, changed(path, model="speaker")).json
    answer = speaking.post(path, changed(path, model="speaker", **dict.fromkeys(names)))
    assert answer.status == 200, answer.body
    assert text_of(answer.json) == text_of(plain) != ""
    for name in names:
        odd = speaking.post(path, changed(path, model="speaker", **{name: {"odd": [1]}}))
        assert refusal(odd)[0] == 400
        assert path == "/v1/messages" or odd.json["error"]["param"].startswith(name)


def test_an_answer_can_be_sent_back_as_it_came(speaking: Running) -> None:
    """A chat's message with all its fields, those that OpenAI's own answers have beside ours too."""
    first = speaking.post("/v1/chat/completions", {**CHAT, "model": "speaker"}).json["choices"][0]["message"]
    more = {"audio": None, "function_call": None, "tool_calls": None, "annotations": [], "name": None}
    messages: list[dict[str, Any]] = [said("a"), {**more, **first}, said("b")]
    answer = speaking.post("/v1/chat/completions", {**CHAT, "model": "speaker", "messages": messages})
    assert answer.status == 200, answer.body
    messages[1]["refusal"] = "No."
    refused = speaking.post("/v1/chat/completions", {**CHAT, "model": "speaker", "messages": messages})
    assert (refused.status, refused.json["error"]["param"]) == (400, "messages[1].refusal")


def test_no_place_on_this_machine_is_told(speaking: Running, speaker: Path) -> None:
    """Where a model is stays its server's own: what its files are at fault for is told by their names."""
    model = speaking.serving.models.loaded
    assert model
    told = about_model(BadInput(f"{speaker}/tokenizer/chat_template.jinja: it fails", f"See {speaker}."), None, model)
    assert told.message == "tokenizer/chat_template.jinja: it fails. See the model."


def test_raw_bytes_do_no_harm(server: Running) -> None:
    """Requests that are none get 400 or nothing, and the next client its answer."""
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    for data in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
        b"GET / HTTP/1.1\r\nhost: localhost\r\n" + b"x: y\r\n" * 20_000,
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        head + b"content-length: -1\r\n\r\n{}",
        head + b"content-length: 5\r\ncontent-length: 6\r\n\r\n{}",
        head + b"content-length: " + b"9" * 400 + b"\r\n\r\n{}",
        head + b"transfer-encoding: chunked\r\n\r\nZZ\r\n{}\r\n0\r\n\r\n",
        head + b"transfer-encoding: chunked\r\n\r\nffffffffffffffffffff\r\n{}",
        head + b"content-length: 100\r\n\r\n{",
        b"GET /v1/models/%ff%00 HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET http://[::1 HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
        b"\r\n" * 1000,
    ):
        found = server.raw(data)
        assert b"500 Internal" not in found, data[:60]
    assert server.post("/v1/completions", COMPLETION).status == 200
    assert not [line for line in server.lines if line["event"] in ("failure", "library")]
