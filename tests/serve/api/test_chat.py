"""Chat completions, on the smallest bundle: beside the model asked directly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pocketmoe.runtime.model import LoadRequest, Model
from tests.serve.client import Running

PATH = "/v1/chat/completions"


def asked(**more: Any) -> dict[str, Any]:
    return {"model": "small", "messages": [{"role": "user", "content": "a b c"}], "max_tokens": 8, **more}


@pytest.fixture(scope="module")
def model(small: Path) -> Any:
    with Model(small, LoadRequest()) as model:
        yield model


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        ({"temperature": 1, "seed": 5}, {"temperature": 1, "seed": 5}),
        ({"temperature": 1, "seed": -1, "top_k": 3}, {"temperature": 1, "seed": 2**64 - 1, "top_k": 3}),
        ({"temperature": 1, "seed": 9, "top_p": 0.9}, {"temperature": 1, "seed": 9, "top_p": 0.9}),
        ({"logit_bias": {"3": 100}}, {"logit_bias": {3: 100}}),
        ({"stop": ["d", "e"], "presence_penalty": 2}, {"stop": ("d", "e"), "presence_penalty": 2}),
        ({"ignore_eos": True, "temperature": 1, "seed": 2}, {"min_tokens": 8, "temperature": 1, "seed": 2}),
        ({"chat_template_kwargs": {"shout": True}}, {"template": {"shout": True}}),
        ({"max_tokens": None, "max_completion_tokens": 3}, {"max_tokens": 3}),
    ],
)  # fmt: skip
def test_an_answer_is_the_models_own(
    server: Running, model: Model, fields: dict[str, Any], options: dict[str, Any]
) -> None:
    """Every setting reaches the model; whole and streamed, the text, its tokens and their number are the same."""
    messages = [{"role": "user", "content": "a b c"}]
    told: Any = {"authors": True, "max_tokens": 8, **options}
    expected = model.generate(messages, **told)
    whole = server.post(PATH, asked(return_token_ids=True, **fields)).json
    (choice,) = whole["choices"]
    assert choice["message"]["content"] == expected.text
    assert choice["token_ids"] == list(expected.tokens)
    assert choice["finish_reason"] == {"length": "length", "stop": "stop"}[expected.stop_reason]
    assert whole["usage"]["completion_tokens"] == len(expected.tokens)
    assert whole["usage"]["prompt_tokens"] == expected.prompt_tokens
    streamed = server.post(
        PATH, asked(stream=True, return_token_ids=True, stream_options={"include_usage": True}, **fields)
    )
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *chunks, last, done = streamed.events
    assert done == "[DONE]"
    assert last["choices"] == []
    assert {**last["usage"], "prompt_tokens_details": None} == {**whole["usage"], "prompt_tokens_details": None}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected.text
    ids = [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])]
    assert ids == list(expected.tokens)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == choice["finish_reason"]


def test_an_answer_is_held_to_a_schema(server: Running) -> None:
    """What cannot be held is refused by name; what can is compiled for the model's tokens, or refused for want of them.

    The smallest bundle's words are a to h, of which no JSON can be made but by luck; `tests/test_structured.py` has
    models that can.
    """
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "not": {}}}}
    refused = server.post(PATH, asked(response_format=wrong))
    assert (refused.status, refused.json["error"]["param"]) == (400, "response_format")
    assert "'not'" in refused.json["error"]["message"]
    other = server.post(PATH, asked(response_format={"type": "xml"}))
    assert other.json["error"]["param"].startswith("response_format")
    assert server.post(PATH, asked(response_format={"type": "text"})).status == 200


def test_several_choices_have_seeds_of_their_own(server: Running, model: Model) -> None:
    """`n` answers are those of the seed and the numbers after it."""
    messages = [{"role": "user", "content": "a b c"}]
    choices = server.post(PATH, asked(n=3, seed=7, temperature=1)).json["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    for seed, choice in enumerate(choices, 7):
        assert choice["message"]["content"] == model.generate(messages, seed=seed, temperature=1, max_tokens=8).text


def test_log_probabilities_are_the_models(server: Running, model: Model) -> None:
    """Of each token, and of the likeliest; streamed and whole alike."""
    found = model.generate([{"role": "user", "content": "a b c"}], logprobs=2, max_tokens=8)
    whole = server.post(PATH, asked(logprobs=True, top_logprobs=2)).json["choices"][0]["logprobs"]["content"]
    assert found.logprobs is not None
    assert [entry["logprob"] for entry in whole] == pytest.approx([each.logprob for each in found.logprobs])
    assert [len(entry["top_logprobs"]) for entry in whole] == [2] * len(found.tokens)
    chunks = server.post(PATH, asked(logprobs=True, top_logprobs=2, stream=True)).events[:-1]
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [entry for each in streamed if each for entry in each["content"]] == whole
