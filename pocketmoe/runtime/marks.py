"""Words in a text that arrives in pieces: where it is to stop, and which part of it is the model's reasoning.

A word may be spread over pieces, so the end of a text that could begin one is held back until that is certain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

THINK, THOUGHT = "<think>", "</think>"  # of DeepSeek-R1, Qwen3, GLM and those that came after them


def held_back(text: str, words: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of one of the words."""
    longest = max(map(len, words), default=0) - 1
    ends = range(max(0, len(text) - longest), len(text))
    return next((len(text) - at for at in ends if any(word.startswith(text[at:]) for word in words)), 0)


class StopStrings:
    """Lets a text through up to the first of some strings, which is left out with all that follows."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(filter(None, stops))
        self._held = ""
        self.found: str | None = None  # the string that was met

    def push(self, piece: str) -> str:
        """The text that has become certain. Nothing once a string was met."""
        if self.found is not None:
            return ""
        text = self._held + piece
        places = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if places:
            at, self.found = min(places, key=lambda place: (place[0], -len(place[1])))
            self._held = ""
            return text[:at]
        certain = len(text) - held_back(text, self._stops)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """The rest, once no more pieces come."""
        rest, self._held = self._held, ""
        return rest


class Part(NamedTuple):
    """A piece of an answer: of the reasoning before it, or of what the model says."""

    text: str
    is_reasoning: bool


class Reasoning:
    """Tells the reasoning that a text begins with from the answer after it, while they arrive.

    The marks go, and white space around them; a mark further on is text like any other.
    """

    def __init__(self, begun: bool = False) -> None:
        """`begun`: the prompt has opened the reasoning already."""
        self._mark = THOUGHT if begun else THINK  # what is looked for; none in the answer
        self._held, self._fresh = "", True

    def push(self, piece: str) -> Iterator[Part]:
        """The parts that have become certain."""
        self._held += piece
        if self._mark == THINK:
            begun = self._held.lstrip()
            if len(begun) < len(THINK) and THINK.startswith(begun):
                return
            self._mark = THOUGHT if begun.startswith(THINK) else ""
            self._held = begun.removeprefix(THINK)
        if self._mark and THOUGHT in self._held:
            thought, _, self._held = self._held.partition(THOUGHT)
            yield from self._part(thought.rstrip(), is_reasoning=True)
            self._mark, self._fresh = "", True
        certain = len(self._held)
        if self._mark:
            certain -= held_back(self._held, [THOUGHT])
            certain = len(self._held[:certain].rstrip())
        before, self._held = self._held[:certain], self._held[certain:]
        yield from self._part(before, is_reasoning=bool(self._mark))

    def finish(self) -> Iterator[Part]:
        """The rest, once no more pieces come."""
        rest, self._held = self._held, ""
        yield from self._part(rest, is_reasoning=self._mark == THOUGHT)

    def _part(self, text: str, is_reasoning: bool) -> Iterator[Part]:
        text = text.lstrip() if self._fresh else text
        if text:
            self._fresh = False
            yield Part(text, is_reasoning)


def split_reasoning(text: str, begun: bool = False) -> tuple[str, str]:
    """The reasoning in an answer, and the rest of it."""
    reasoning = Reasoning(begun)
    parts = [*reasoning.push(text), *reasoning.finish()]
    said = ["".join(part.text for part in parts if part.is_reasoning is which) for which in (True, False)]
    return said[0], said[1]
