"""Stop strings in a text that comes in any pieces."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from pocketmoe.runtime.stop_strings import StopStrings

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
