"""Anthropic's messages, on the smallest bundle: beside the model asked directly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pocketmoe.runtime.model import LoadRequest, Model
from tests.serve.client import Answer, Running

PATH = "/v1/messages"


@pytest.fixture(scope="module")
def model(small: Path) -> Iterator[Model]:
    with Model(small, LoadRequest()) as model:
        yield model


def asked(**more: Any) -> dict[str, Any]:
    return {"model": "small", "messages": [{"role": "user", "content": "a b c"}], "max_tokens": 8, **more}


def assembled(answer: Answer) -> dict[str, Any]:
    """The message that a stream's events make, by the rules of Anthropic's clients."""
    first, *rest = answer.events
    assert first["type"] == "message_start"
    message = first["message"]
    for each in rest:
        if each["type"] == "content_block_start":
            assert each["index"] == len(message["content"])
            message["content"].append(each["content_block"])
        elif each["type"] == "content_block_delta":
            kind = each["delta"]["type"].removesuffix("_delta")
            message["content"][each["index"]][kind] += each["delta"][kind]
        elif each["type"] == "message_delta":
            message |= each["delta"]
            message["usage"] |= each["usage"]
    assert rest[-1] == {"type": "message_stop"}
    starts = [each["index"] for each in rest if each["type"] == "content_block_start"]
    assert [each["index"] for each in rest if each["type"] == "content_block_stop"] == starts
    names = [line[7:] for line in answer.body.decode().split("\n") if line.startswith("event: ")]
    assert names == [each["type"] for each in answer.events]
    return message


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        ({"temperature": 0.0, "top_k": 3}, {"temperature": 0.0, "top_k": 3}),
        ({"system": "d"}, {}),
        ({"system": [{"type": "text", "text": "d", "cache_control": {"type": "ephemeral"}}]}, {}),
        ({"stop_sequences": ["d", "e", "f", "e f"]}, {"stop": ["d", "e", "f", "e f"]}),
        ({"max_tokens": 10_000}, {"max_tokens": 10_000}),
    ],
)
def test_a_message_is_the_models_answer(
    server: Running, model: Model, fields: dict[str, Any], options: dict[str, Any]
) -> None:
    """Whole, and put together from its events, it is the same message, with the model's own text and reasons."""
    messages = [*([{"role": "system", "content": "d"}] if "system" in fields else [])]
    messages.append({"role": "user", "content": "a b c"})
    told: Any = {"authors": True, "max_tokens": 8, **options}
    expected = model.generate(messages, **told)
    whole = server.post(PATH, asked(**fields)).json
    assert whole["content"] == [{"type": "text", "text": expected.text}]
    reasons = {"length": "max_tokens", "stop": "stop_sequence", "context": "model_context_window_exceeded"}
    assert whole["stop_reason"] == reasons[expected.stop_reason]
    assert whole["usage"] == {"input_tokens": expected.prompt_tokens, "output_tokens": len(expected.tokens)}
    if expected.stop_reason == "stop":
        rest = model.detokenize(expected.tokens)[len(expected.text) :]
        assert rest.startswith(whole["stop_sequence"])
        assert whole["stop_sequence"] in fields["stop_sequences"]
    message = assembled(server.post(PATH, asked(stream=True, **fields)))
    assert {**message, "id": 0} == {**whole, "id": 0}
    body = {name: value for name, value in asked(**fields).items() if name in ("model", "messages", "system")}
    assert server.post(f"{PATH}/count_tokens", body).json == {"input_tokens": expected.prompt_tokens}


def test_thinking_has_blocks_of_its_own() -> None:
    """What stands between the marks of reasoning is a block before the text, in events and in the whole."""
    from pocketmoe.serve.api import messages
    from pocketmoe.serve.api.sampling import encode
    from pocketmoe.serve.api.work import Choice, Piece
    from pocketmoe.tools.families import Dialect

    _, reply = messages.read(encode(asked(stream=True)))
    list(reply.begin(None, [Choice(0, 3, Dialect().parser(begun=True))]))  # type: ignore[arg-type]
    for text in ("so", " it is</thi", "nk>", "\nyes", " no"):
        list(reply.push(Piece(0, text, (), ())))
    assert reply.blocks == [
        {"type": "thinking", "thinking": "so it is", "signature": ""},
        {"type": "text", "text": "yes no"},
    ]


def test_errors_are_anthropics(server: Running) -> None:
    """Their object, type and status; the field is named."""
    missing = server.post(PATH, {"model": "small", "messages": [{"role": "user", "content": "a"}]})
    assert missing.status == 400
    assert missing.json["type"] == "error"
    assert missing.json["error"]["type"] == "invalid_request_error"
    assert "max_tokens" in missing.json["error"]["message"]
    unknown = server.post(PATH, asked(model="other"))
    assert (unknown.status, unknown.json["error"]["type"]) == (404, "not_found_error")
    full = server.post(PATH, asked(messages=[{"role": "user", "content": "a " * 100}]))
    assert full.status == 400
    assert "too long" in full.json["error"]["message"]
    assert "thinking" in server.post(PATH, asked(thinking={"type": "disabled"})).json["error"]["message"]


def test_tokens_there_and_back(server: Running, model: Model) -> None:
    """A text's ids are the tokenizer's, a conversation's the template's; ids become the text again."""
    found = server.post("/tokenize", {"model": "small", "prompt": "a b c"}).json
    assert found == {"tokens": model.tokenize("a b c"), "count": 3, "max_model_len": 64}
    chat = server.post("/tokenize", {"model": "small", "messages": [{"role": "user", "content": "a b c"}]}).json
    assert chat["tokens"] == [*found["tokens"], 6]
    back = server.post("/detokenize", {"model": "small", "tokens": found["tokens"]}).json
    assert back == {"prompt": model.detokenize(found["tokens"])}
    for tokens in ([8], [-1], [2**31]):
        assert server.post("/detokenize", {"model": "small", "tokens": tokens}).status == 400
    both = {"model": "small", "prompt": "a", "messages": [{"role": "user", "content": "a"}]}
    assert server.post("/tokenize", both).json["error"]["param"] == "prompt"
