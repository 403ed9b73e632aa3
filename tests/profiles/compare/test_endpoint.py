"""Measuring an OpenAI-compatible server, against a real one on loopback whose delays are known."""

from __future__ import annotations

import pytest

from pocketmoe.errors import BadInput
from pocketmoe.profiles.compare.endpoint import EndpointError, Plan, Target, measure
from tests.profiles.completions_server import Behaviour, serving

PLAN = Plan(prompt_tokens=20, output_tokens=16, users=(1, 4), requests=4)
KEY = "sk-very-secret"


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_the_delays_of_the_server_are_what_is_measured(api: str) -> None:
    """First token, rate per user and throughput are those that the server's own sleeping makes."""
    behaviour = Behaviour(first_s=0.08, step_s=0.02)
    with serving(behaviour) as url:
        found = measure(Target(url, "m", api, KEY), PLAN, "2026-11-24T00:00:00+00:00")
    assert [level.users for level in found.levels] == [1, 4]
    answer_s = 0.08 + 15 * 0.02
    for level in found.levels:
        assert 0.08 <= level.ttft_median_s < 0.13
        assert 50 * 0.75 < level.tokens_per_s_per_user <= 50
        assert 0.75 * level.users * 16 / answer_s < level.tokens_per_s <= level.users * 16 / answer_s
        assert (level.prompt_tokens, level.output_tokens) == (21, 16)
    assert behaviour.most_at_once == 4
    assert {request["path"] for request in behaviour.asked} == {f"/v1/{'chat/' * (api == 'chat')}completions"}
    assert len(behaviour.asked) == 1 + 4 + 4
    assert {*behaviour.keys} == {f"Bearer {KEY}"}
    assert KEY not in repr(found)


def test_prompts_differ_and_have_about_the_length_asked_for() -> None:
    """No server can answer from its cache of prompts; a word is about a token."""
    behaviour = Behaviour(first_s=0, step_s=0.001)
    with serving(behaviour) as url:
        measure(Target(f"{url}/v1/", "m"), PLAN, "")
    prompts = [request["prompt"] for request in behaviour.asked]
    assert len({prompt[:12] for prompt in prompts}) == len(prompts)
    assert all(abs(len(prompt.split()) - 20) <= 2 for prompt in prompts)
    assert all(request["max_tokens"] == 16 and request["stream"] for request in behaviour.asked)


def test_tokens_are_counted_by_the_server_where_it_counts() -> None:
    """Pieces of two tokens are two tokens when the server says so, and one, with a note, when it does not."""
    with serving(Behaviour(step_s=0.01, tokens_per_piece=2)) as url:
        told = measure(Target(url, "m"), PLAN, "")
    with serving(Behaviour(step_s=0.01, tokens_per_piece=2, usage=False)) as url:
        untold = measure(Target(url, "m"), PLAN, "")
    assert (told.counted_by, told.levels[0].output_tokens) == ("server", 16)
    assert (untold.counted_by, untold.levels[0].output_tokens) == ("pieces", 8)
    assert any("does not count" in note for note in untold.notes)
    assert any("16 were asked for" in note for note in untold.notes)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("401", "401"),
        ("garbage", "not JSON"),
        ("break", "broke off"),
        ("silent", "timed out"),
        ("empty", "no text"),
    ],
)
def test_a_server_that_fails_is_an_error_of_one_line_without_the_key(fault: str, words: str) -> None:
    """Refusals, garbage, an early end, silence and empty answers are told apart; what is said never holds the key."""
    with serving(Behaviour(first_s=0, step_s=0.001, fault=fault)) as url, pytest.raises(EndpointError) as caught:
        measure(Target(url, "m", key=KEY, timeout_s=0.5), PLAN, "")
    assert words in caught.value.one_line()
    assert KEY not in caught.value.one_line()
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://127.0.0.1:1", "not the address"),
        ("127.0.0.1:8000", "not the address"),
        ("http://127.0.0.1:99999", "not the address"),
        ("http://user:secret@127.0.0.1:1", "password"),
        ("http://example.invalid:1", "unencrypted"),
        ("http://127.0.0.1:9", "cannot be measured"),
    ],
)
def test_addresses_that_cannot_be_measured_are_refused(url: str, words: str) -> None:
    """Nothing is sent to what is no address, and a key never goes over the network in the clear."""
    with pytest.raises(BadInput) as caught:
        measure(Target(url, "m", key=KEY, timeout_s=2), PLAN, "")
    assert words in caught.value.one_line()
    assert "secret" not in caught.value.one_line()


def test_the_number_of_requests_is_bounded() -> None:
    """More requests than the plan allows are refused before the first."""
    with pytest.raises(BadInput, match="401 requests"):
        measure(Target("http://127.0.0.1:9", "m"), Plan(20, 16, users=(200, 200)), "")
