"""Strings at which an answer is to stop, in a text that arrives in pieces.

A string may be spread over pieces, so the end of a text that could begin one is held back until that is certain.
"""

from __future__ import annotations

from collections.abc import Sequence

from pocketmoe.tools.sections import held_back


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
