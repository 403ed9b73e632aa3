"""OpenAI's own client understands what the server says: answers, streams, log probabilities, refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed: pip install pocketmoe[dev]")

from openai import OpenAI  # noqa: E402 - only where it is installed

from pocketmoe.runtime.model import LoadRequest, Model  # noqa: E402
from tests.hang import HANG_S  # noqa: E402
from tests.serve.client import Running, request_for, running  # noqa: E402

KEY = "sesame"
SAID: Any = [{"role": "user", "content": "a b c"}]


@pytest.fixture(scope="module")
def client(small: Path) -> Iterator[OpenAI]:
    """A client of a server that wants a key."""
    with running(request_for(small, keys=(KEY,))) as server, client_of(server) as made:
        yield made


def client_of(server: Running, key: str = KEY) -> OpenAI:
    return OpenAI(base_url=f"{server.serving.url}/v1", api_key=key, max_retries=0, timeout=HANG_S)


@pytest.fixture(scope="module")
def expected(small: Path) -> Any:
    """What the model itself answers."""
    with Model(small, LoadRequest()) as model:
        yield model.generate(SAID, max_tokens=8, logprobs=2)


def test_models_are_listed(client: OpenAI) -> None:
    """The list and a model by its name; one that is not there is not found."""
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("large")


def test_a_chat_is_answered(client: OpenAI, expected: Any) -> None:
    """Whole, with usage and log probabilities, and as a stream whose pieces make the same text."""
    options: Any = {"model": "small", "messages": SAID, "max_completion_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    (choice,) = whole.choices
    assert choice.message.content == expected.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert choice.logprobs
    assert choice.logprobs.content
    assert [entry.logprob for entry in choice.logprobs.content] == pytest.approx(
        [entry.logprob for entry in expected.logprobs]
    )
    assert whole.usage
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (expected.prompt_tokens, len(expected.tokens))
    with client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = [*stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected.text
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == len(expected.tokens)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"


def test_a_text_is_continued_and_scored(client: OpenAI) -> None:
    """Completions of several prompts at once, and the log probabilities of a prompt's own tokens, as lm-eval asks."""
    found = client.completions.create(model="small", prompt=["a b", "c"], n=2, max_tokens=3, temperature=0)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.choices[0].text == found.choices[1].text
    scored = client.completions.create(model="small", prompt="a b c d", echo=True, logprobs=1, max_tokens=0)
    (choice,) = scored.choices
    assert choice.text == "a b c d"
    assert choice.logprobs
    assert choice.logprobs.token_logprobs
    assert choice.logprobs.tokens
    assert choice.logprobs.token_logprobs[0] is None
    assert all(logprob < 0 for logprob in choice.logprobs.token_logprobs[1:])
    assert choice.logprobs.tokens == ["a", "b", "c", "d"]


def test_what_is_wrong_is_an_error_of_the_clients_own(client: OpenAI, small: Path) -> None:
    """Each kind of refusal is the exception that programs catch, and names the parameter where there is one."""
    with pytest.raises(openai.NotFoundError, match="large"):
        client.chat.completions.create(model="large", messages=SAID)
    with pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(model="small", messages=SAID, temperature=-1)
    assert found.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(model="small", messages=[{"role": "user", "content": "a " * 500}])
    assert found.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with running(request_for(small, queue=0)) as server, client_of(server, "none") as other:
        server.serving.admission.inside = server.serving.parallel  # all places are taken
        with pytest.raises(openai.RateLimitError) as refused:
            other.chat.completions.create(model="small", messages=SAID)
        assert int(refused.value.response.headers["retry-after"]) > 0
        server.serving.admission.inside = 0


def test_a_stream_that_is_left_ends_the_work(small: Path) -> None:
    """The client's `with` block ends after a piece: the server notes that it is gone, and answers the next one."""
    with running(request_for(small)) as server, client_of(server, "none") as client:
        options: Any = {"model": "small", "messages": SAID, "temperature": 0}
        with client.chat.completions.create(**options, stream=True, max_tokens=50) as stream:
            next(iter(stream))
        server.wait_for(event="request", path="/v1/chat/completions")
        assert client.chat.completions.create(**options, max_tokens=2).choices[0].message.content


HELD: Any = {
    "type": "object",
    "properties": {"unit": {"type": "string", "enum": ["C", "F"]}},
    "required": ["unit"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def talker(speaking: Running) -> Iterator[OpenAI]:
    """A client of a server whose model can be held to JSON and to calls."""
    with client_of(speaking) as made:
        yield made


def test_a_response_is_put_together_from_its_events(talker: OpenAI) -> None:
    """By the client's own helper, which has the same text and status as the whole response."""
    options: Any = {"model": "speaker", "input": "hello", "max_output_tokens": 12, "temperature": 0}
    whole = talker.responses.create(**options)
    assert whole.output_text
    assert whole.status == "incomplete"
    assert whole.incomplete_details
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage
    assert whole.usage.output_tokens == 12
    said = talker.chat.completions.create(
        model="speaker", messages=[{"role": "user", "content": "hello"}], max_tokens=12, temperature=0
    )
    assert whole.output_text == said.choices[0].message.content
    with talker.responses.stream(**options) as stream:
        pieces = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert "".join(pieces) == whole.output_text
    counted = talker.responses.input_tokens.count(model="speaker", input="hello")
    assert counted.input_tokens == whole.usage.input_tokens


def test_a_response_of_a_form(talker: OpenAI) -> None:
    """A class of the caller's is what the answer becomes."""
    from pydantic import BaseModel

    class Answer(BaseModel):
        unit: Literal["C", "F"]

    found = talker.responses.parse(
        model="speaker", input="which?", text_format=Answer, max_output_tokens=200, temperature=0
    )
    assert found.output_parsed
    assert found.output_parsed.unit in ("C", "F")


def test_responses_call_tools_and_take_results(talker: OpenAI) -> None:
    """A call that is forced, its result sent back with the call's own items, and an answer; nothing is kept between."""
    tools: Any = [{"type": "function", "name": "weather", "parameters": HELD, "strict": True}]
    options: Any = {"model": "speaker", "tools": tools, "temperature": 0}
    asked: list[Any] = [{"role": "user", "content": "weather?"}]
    one: Any = {"tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 200}
    with talker.responses.stream(input=asked, **options, **one) as stream:
        done = [event for event in stream if event.type == "response.function_call_arguments.done"]
        first = stream.get_final_response()
    (call,) = first.output
    assert call.type == "function_call"
    assert json.loads(call.arguments)["unit"] in ("C", "F")
    assert [event.arguments for event in done] == [call.arguments]
    asked += first.output
    asked.append({"type": "function_call_output", "call_id": call.call_id, "output": "12 degrees"})
    answer = talker.responses.create(input=asked, **options, tool_choice="none", max_output_tokens=5)
    assert answer.output_text
    assert answer.usage
    assert first.usage
    assert answer.usage.input_tokens > 0
    with pytest.raises(openai.BadRequestError) as refused:
        talker.responses.create(input="and?", **options, previous_response_id=first.id)
    assert (refused.value.param, refused.value.code) == ("previous_response_id", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError):
        talker.responses.retrieve(first.id)
