"""Reasoning before an answer, told from it, whatever pieces the text arrives in."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketmoe.tools.calls import Parsed
from pocketmoe.tools.families import Dialect

BRACKETS = ("[THINK]", "[/THINK]")
WORDS = ["<think>", "</think>", "<thi", "nk>", *BRACKETS, "a", " ", "\n", "b<"]
DIALECTS = [Dialect(), Dialect(thinks=BRACKETS)]


def split(text: str, dialect: Dialect = DIALECTS[0], begun: bool = False) -> tuple[str, str]:
    """Reasoning and content, by a look at the whole text."""
    opening, closing = dialect.thinks or ("<think>", "</think>")
    if not begun and not text.lstrip().startswith(opening):
        return "", text.lstrip()
    thought, found, rest = (text if begun else text.lstrip().removeprefix(opening)).partition(closing)
    return thought.strip(), rest.lstrip() if found else ""


@pytest.mark.parametrize("dialect", DIALECTS)
@given(words=st.lists(st.sampled_from(WORDS), max_size=10),
       cuts=st.lists(st.integers(0, 60), max_size=12), begun=st.booleans())  # fmt: skip
def test_reasoning_is_the_same_in_any_pieces(dialect: Dialect, words: list[str], cuts: list[int], begun: bool) -> None:
    """The parts together are what a look at the whole text says; nothing that was said is taken back."""
    text = "".join(words)
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    parser = dialect.parser(begun=begun)
    parts = [part for start, end in itertools.pairwise(places) for part in parser.push(text[start:end])]
    found = Parsed.of([*parts, *parser.finish()])
    assert (found.reasoning, found.content) == split(text, dialect, begun)
    assert not found.calls


def test_reasoning_is_set_apart() -> None:
    """With the marks and the space around them left out; also where the prompt has opened it, or it never ends."""
    for text, begun, expected in (
        ("<think>\nhm\n\n</think>\n\nYes. ", False, ("hm", "Yes. ")),
        ("hm</think>Yes", True, ("hm", "Yes")),
        ("<think>hm", False, ("hm", "")),
        ("<think>\n\n</think>\n\n4", False, ("", "4")),
        ("a < b", False, ("", "a < b")),
        ("Write <think> or </think>.", False, ("", "Write <think> or </think>.")),
    ):
        found = Dialect().parse([text], begun=begun)
        assert (found.reasoning, found.content) == expected


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_prompt_opens_reasoning_with_the_models_own_mark(dialect: Dialect) -> None:
    """At its end, white space aside; another family's mark is text."""
    mine, other = (marks[0] for marks in ((BRACKETS, ("<think>",)) if dialect.thinks else (("<think>",), BRACKETS)))
    assert dialect.opens_reasoning(f"User: hi. Assistant: {mine}\n")
    assert not dialect.opens_reasoning(f"{mine} then more")
    assert not dialect.opens_reasoning(f"Assistant: {other}")
