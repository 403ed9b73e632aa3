"""Completions, on the smallest bundle: continued texts, and scores as evaluation harnesses read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pocketmoe.runtime.model import LoadRequest, Model
from tests.serve.client import Running

PATH = "/v1/completions"


@pytest.fixture(scope="module")
def model(small: Path) -> Any:
    with Model(small, LoadRequest()) as model:
        yield model


def test_texts_and_ids_are_continued_alike(server: Running, model: Model) -> None:
    """One text, one list of ids, several of each: each choice continues its own prompt."""
    texts = ["a b c", "d e", "h"]
    expected = [model.generate(text, raw=True, max_tokens=5).text for text in texts]
    ids = [model.tokenize(text) for text in texts]
    for prompt in (texts, ids):
        found = server.post(PATH, {"model": "small", "prompt": prompt, "max_tokens": 5}).json
        assert [choice["text"] for choice in found["choices"]] == expected
        assert found["usage"]["prompt_tokens"] == sum(map(len, ids))
        for one, text in zip(prompt, expected, strict=True):
            answer = server.post(PATH, {"model": "small", "prompt": one, "max_tokens": 5}).json
            assert [choice["text"] for choice in answer["choices"]] == [text]
    assert len(server.post(PATH, {"model": "small", "prompt": "a"}).json["choices"][0]["text"].split()) == 16


@pytest.mark.parametrize("most", [0, 1, 4])
def test_echo_scores_the_prompt(server: Running, model: Model, most: int) -> None:
    """Every token of the prompt but the first has the model's log probability; then come the answer's, if any."""
    ids = model.tokenize("a b c d e")
    scored = model.logprobs(ids, 2)
    body = {"model": "small", "prompt": [ids], "echo": True, "logprobs": 2, "max_tokens": most}
    (choice,) = server.post(PATH, body).json["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:5] == pytest.approx([each.logprob for each in scored])
    assert len(logprobs["tokens"]) == len(logprobs["top_logprobs"]) == len(logprobs["text_offset"]) == 5 + most
    assert [len(top) for top in logprobs["top_logprobs"][1:]] == [2] * (4 + most)
    assert choice["text"].startswith(model.detokenize(ids))
    if most:
        answer = model.generate(ids, max_tokens=most, logprobs=2)
        assert answer.logprobs is not None
        assert logprobs["token_logprobs"][5:] == pytest.approx([each.logprob for each in answer.logprobs])
        assert choice["text"] == model.detokenize(ids) + answer.text
    streamed = server.post(PATH, {**body, "stream": True}).events
    told = [chunk["choices"][0]["logprobs"] for chunk in streamed[:-1]]
    assert [value for each in told if each for value in each["token_logprobs"]] == logprobs["token_logprobs"]
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed[:-1]) == choice["text"]
