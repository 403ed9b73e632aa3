"""Anthropic's own client understands what the server says: messages, streams, tokens counted, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

anthropic = pytest.importorskip("anthropic", reason="Anthropic's client is not installed: pip install pocketmoe[dev]")

from anthropic import Anthropic  # noqa: E402 - only where it is installed

from pocketmoe.runtime.model import LoadRequest, Model  # noqa: E402
from tests.hang import HANG_S  # noqa: E402
from tests.serve.client import request_for, running  # noqa: E402

KEY = "sesame"
SAID: Any = [{"role": "user", "content": "a b c"}]
GREEDY = {"temperature": 0}  # of which the client itself knows nothing any more


@pytest.fixture(scope="module")
def client(small: Path) -> Iterator[Anthropic]:
    """A client of a server that wants a key."""
    with running(request_for(small, keys=(KEY,))) as server:
        url = server.serving.url
        with Anthropic(base_url=url, api_key=KEY, max_retries=0, timeout=HANG_S) as made:
            yield made


@pytest.fixture(scope="module")
def expected(small: Path) -> Any:
    """What the model itself answers."""
    with Model(small, LoadRequest()) as model:
        yield model.generate(SAID, max_tokens=8)


def test_a_message_is_answered(client: Anthropic, expected: Any) -> None:
    """Whole, with its usage, and why it ended."""
    message = client.messages.create(model="small", max_tokens=8, messages=SAID, extra_body=GREEDY)
    (block,) = message.content
    assert block.type == "text"
    assert block.text == expected.text
    assert message.stop_reason == "max_tokens"
    counted = message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)
    assert (counted, message.usage.output_tokens) == (expected.prompt_tokens, len(expected.tokens))


def test_a_stream_says_the_same(client: Anthropic, expected: Any) -> None:
    """By the client's own helper, which checks the order of events, and puts the message together."""
    with client.messages.stream(model="small", max_tokens=8, messages=SAID, extra_body=GREEDY) as stream:
        pieces = [*stream.text_stream]
        message = stream.get_final_message()
    assert len(pieces) > 1
    (block,) = message.content
    assert block.type == "text"
    assert "".join(pieces) == block.text == expected.text
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == len(expected.tokens)


def test_what_stops_is_told(client: Anthropic, expected: Any) -> None:
    """A stop sequence ends the answer before it, and is named."""
    word = expected.text.split()[3]
    message = client.messages.create(
        model="small", max_tokens=8, messages=SAID, extra_body=GREEDY, stop_sequences=[word]
    )
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", word)
    (block,) = message.content
    assert block.type == "text"
    assert expected.text.startswith(block.text)
    assert word not in block.text


def test_tokens_are_counted(client: Anthropic, expected: Any) -> None:
    """Before anything is computed, as they are counted after it; a system message counts too."""
    assert client.messages.count_tokens(model="small", messages=SAID).input_tokens == expected.prompt_tokens
    more = client.messages.count_tokens(model="small", messages=SAID, system="d e").input_tokens
    assert more == expected.prompt_tokens + 2


def test_what_is_wrong_is_an_error_of_the_clients_own(client: Anthropic) -> None:
    """Each kind of refusal is the exception that programs catch."""
    with pytest.raises(anthropic.NotFoundError, match="large"):
        client.messages.create(model="large", max_tokens=8, messages=SAID)
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model="small", max_tokens=8, messages=SAID, extra_body={"temperature": -1})
    with pytest.raises(anthropic.BadRequestError, match="context"):
        client.messages.create(model="small", max_tokens=8, messages=[{"role": "user", "content": "a " * 500}])
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="wrong").messages.create(model="small", max_tokens=8, messages=SAID)
