"""Stop strings and reasoning in a text that comes in any pieces."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from pocketmoe.runtime.marks import Reasoning, StopStrings, split_reasoning

ALPHABET = "ab<"


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


@given(st.text(ALPHABET, max_size=30), st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3),
       st.lists(st.integers(0, 40), max_size=12))  # fmt: skip
def test_a_text_ends_before_the_first_stop_string(text: str, stops: list[str], cuts: list[int]) -> None:
    """Whatever the pieces are; nothing is shown that is taken back, and nothing is held back that cannot be one."""
    filter_ = StopStrings(stops)
    shown = [filter_.push(piece) for piece in pieces_of(text, cuts)]
    certain = "".join(shown)
    whole = certain + filter_.finish()
    if filter_.found is None:
        assert whole == text
        assert not any(stop in text for stop in stops)
        assert len(text) - len(certain) < max(map(len, stops), default=1)
    else:
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        assert text.startswith(whole + filter_.found)
        assert len(whole) <= max(ends)
        assert not any(stop in whole for stop in stops)


@given(st.lists(st.sampled_from(["<think>", "</think>", "<thi", "nk>", "a", " ", "\n", "b<"]), max_size=10),
       st.lists(st.integers(0, 60), max_size=12), st.booleans())  # fmt: skip
def test_reasoning_is_the_same_in_any_pieces(words: list[str], cuts: list[int], begun: bool) -> None:
    """The parts together are those of the whole text at once."""
    text = "".join(words)
    reasoning = Reasoning(begun)
    parts = [part for piece in pieces_of(text, cuts) for part in reasoning.push(piece)] + [*reasoning.finish()]
    said = tuple("".join(part.text for part in parts if part.is_reasoning is which) for which in (True, False))
    assert said == split_reasoning(text, begun)


def test_reasoning_is_set_apart() -> None:
    """With the marks and the space around them left out; also where the prompt has opened it, or it never ends."""
    assert split_reasoning("<think>\nhm\n\n</think>\n\nYes. ") == ("hm", "Yes. ")
    assert split_reasoning("hm</think>Yes", begun=True) == ("hm", "Yes")
    assert split_reasoning("<think>hm") == ("hm", "")
    assert split_reasoning("<think>\n\n</think>\n\n4") == ("", "4")
    assert split_reasoning("a < b") == ("", "a < b")
    assert split_reasoning("Write <think> or </think>.") == ("", "Write <think> or </think>.")
