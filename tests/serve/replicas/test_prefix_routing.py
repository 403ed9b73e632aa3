"""Requests go where the longest beginning of their text is, and not where too much waits already."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pocketmoe.serve.replicas.prefix_routing import BLOCK_BYTES, PrefixRouting, text_of

LONG = "word " * (BLOCK_BYTES // 2)


def said(*texts: str) -> dict[str, Any]:
    """A conversation of turns by the user and the model."""
    roles = ("user", "assistant")
    return {"model": "m", "messages": [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]}


messages = st.lists(st.text(max_size=50), min_size=1, max_size=6)


@given(messages, messages)
@settings(deadline=None)
def test_a_conversation_that_goes_on_begins_as_it_did(before: list[str], more: list[str]) -> None:
    """Its text begins with that of every earlier turn; so does a prompt's, as a text and as token ids."""
    assert text_of(said(*before, *more)).startswith(text_of(said(*before)))
    first, second = "".join(before), "".join(more)
    assert text_of({"prompt": f"{first}{second}"}).startswith(text_of({"prompt": first})[:-1])
    ids = [len(text) for text in before]
    assert text_of({"prompt": [*ids, 1, 2]}).startswith(text_of({"prompt": ids}))


@given(st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=12), st.integers(1, 4))
@settings(deadline=None)
def test_turns_stay_with_the_replica_that_has_them(order: list[str], replicas: int) -> None:
    """However the turns of several conversations are mixed, each conversation stays where it began."""
    routing = PrefixRouting(replicas, parallel=1)
    turns: dict[str, list[str]] = {}
    home: dict[str, int] = {}
    for name in order:
        turns.setdefault(name, []).append(f"{name} {LONG}")
        chosen = routing.choose(said(*turns[name]))
        assert home.setdefault(name, chosen) == chosen


def test_unlike_texts_go_where_least_is_done() -> None:
    """Without a known beginning the load decides, and among equals who has begun with the fewest texts."""
    routing = PrefixRouting(3, parallel=2)
    routing.loads[:] = [2, 1, 3]
    assert routing.choose(said("x" + LONG)) == 1
    routing.loads[:] = [0, 0, 0]
    assert sorted(routing.choose(said(f"{name} {LONG}")) for name in "abcdefgh") == [0, 0, 0, 1, 1, 2, 2, 2]


def test_a_busy_replica_is_left_after_a_round_of_answers() -> None:
    """Up to `parallel` requests more than the idlest one it keeps its conversations; beyond, they move, and stay."""
    routing = PrefixRouting(2, parallel=2)
    assert routing.choose(said(LONG)) == 0
    routing.loads[0] = 2
    assert routing.choose(said(LONG, "b")) == 0
    routing.loads[0] = 3
    assert routing.choose(said(LONG, "b")) == 1
    routing.loads[0] = 0
    assert routing.choose(said(LONG, "b", "c")) == 1


def test_a_lost_replica_has_nothing_any_more() -> None:
    """Its conversations go elsewhere, and it starts anew."""
    routing = PrefixRouting(2, parallel=1)
    first = routing.choose(said(LONG))
    routing.forget(first)
    other = routing.choose(said(LONG), without=[first])
    assert other == 1 - first
    assert routing.choose(said(LONG, "b")) == other


def test_what_tells_of_another_prompt_is_another_beginning() -> None:
    """Model, system message and tools stand before a conversation; settings do not."""
    plain = said(LONG)
    for field, value in (("model", "n"), ("system", "s"), ("tools", [{"type": "function"}])):
        assert text_of({**plain, field: value})[:200] != text_of(plain)[:200]
    assert text_of({**plain, "temperature": 1}) == text_of(plain)
