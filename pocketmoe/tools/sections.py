"""An answer that arrives in pieces: content, reasoning, and sections with calls in them.

However the text is cut into pieces, the parts are the same. A section that is no call comes out as content, character
for character. White space between content and calls goes, as does that around reasoning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from pocketmoe.tools.calls import Part, Text, Tool, ToolCall

_MOST_ENDS = 16  # of a section that are tried: its text may hold the closing mark
_MOST_CHARACTERS = 1 << 20  # of a section


@dataclass(frozen=True)
class Section:
    """Between two marks. `read`: its text to its calls, None where it is malformed.

    `closing` "": it goes to the text's end. `at_start`: nothing but white space may come before it. `keeps`: the
    opening mark is part of what is read.
    """

    opening: str
    closing: str
    read: Callable[[str, Sequence[Tool]], list[ToolCall] | None]
    at_start: bool = False
    keeps: bool = False


class Sections:
    """Parts of an answer, as its text arrives."""

    def __init__(
        self,
        sections: Sequence[Section],
        thinks: tuple[str, str],
        tools: Sequence[Tool],
        begun: bool = False,
        calls_first: bool = False,
    ) -> None:
        """`thinks`: the marks around reasoning. `begun`: the prompt has opened it already. `calls_first`: there are no
        calls after content, which may have their marks within a text."""
        self._sections, self._tools, self._thinks, self._calls_first = sections, tools, thinks, calls_first
        self._text = ""  # what is not said yet
        self._mode: Callable[[bool], Iterator[Part]] | None = self._thought if begun else self._start
        self._section: Section | None = None
        self._tried = 0  # ends of the section
        self._said = False  # something other than white space, after the reasoning
        self._space: str = ""  # white space that is content if content follows
        self._trims = True  # the next content loses white space at its beginning
        self._fresh = True  # of the reasoning nothing was said

    def push(self, piece: str) -> list[Part]:
        """The parts that have become certain."""
        self._text += piece
        return [*self._read(is_end=False)]

    def finish(self) -> list[Part]:
        """The rest, once no more pieces come."""
        return [*self._read(is_end=True)]

    def _read(self, is_end: bool) -> Iterator[Part]:
        while self._mode:
            before = self._mode
            yield from before(is_end)
            if self._mode == before:
                return

    def _start(self, is_end: bool) -> Iterator[Part]:
        """Whether reasoning opens the answer."""
        text, opening = self._text.lstrip(), self._thinks[0]
        if text.startswith(opening):
            self._text, self._mode = text.removeprefix(opening), self._thought
            return
        if not is_end and opening.startswith(text):
            return
        self._mode = self._content
        yield from ()

    def _thought(self, is_end: bool) -> Iterator[Part]:
        closing = self._thinks[1]
        text, found, rest = self._text.partition(closing)
        certain = text.rstrip() if found or is_end else self._text[: len(self._text) - held_back(self._text, [closing])]
        certain = certain.rstrip()
        self._text = rest if found else self._text[len(certain) :]
        if self._fresh:
            certain = certain.lstrip()
        if certain:
            self._fresh = False
            yield Text("reasoning", certain)
        if found:
            self._mode = self._content
        elif is_end:
            self._mode = None

    def _content(self, is_end: bool) -> Iterator[Part]:
        places = [(at, section) for section in self._sections if (at := self._place(section)) is not None]
        if places:
            at, self._section = min(places, key=lambda place: (place[0], -len(place[1].opening)))
            before, self._text = self._text[:at], self._text[at:]
            self._mode = self._in_section
            yield from self._say(before)
            return
        marks = [section.opening for section in self._sections if not (section.at_start and self._said)]
        keep = 0 if is_end else held_back(self._text, marks)
        certain, self._text = self._text[: len(self._text) - keep], self._text[len(self._text) - keep :]
        yield from self._say(certain)
        if is_end:
            if self._space and not self._trims:
                yield Text("content", self._space)
            self._mode = None

    def _place(self, section: Section) -> int | None:
        at = self._text.find(section.opening)
        if at < 0 or (section.at_start and self._said):
            return None
        comes_first = section.at_start or self._calls_first
        return None if comes_first and self._text[:at].strip() else at

    def _in_section(self, is_end: bool) -> Iterator[Part]:
        section = self._section
        assert section, "this is a section's text"
        opening, start = len(section.opening), 0 if section.keeps else len(section.opening)
        ends = [*islice(_ends(self._text[:_MOST_CHARACTERS], section.closing, opening), _MOST_ENDS)]
        calls, after = None, 0
        for end in ends[self._tried :]:
            calls, after = section.read(self._text[start:end], self._tools), end + len(section.closing)
            if calls is not None:
                break
        self._tried = len(ends)
        hopeless = len(ends) == _MOST_ENDS or len(self._text) > _MOST_CHARACTERS
        if calls is None and is_end and not hopeless:
            calls, after = section.read(self._text[start:], self._tools), len(self._text)
        if calls is None and not (is_end or hopeless):
            return
        self._mode, self._tried = self._content, 0
        if calls is None:  # the mark is text like any other, and so is what follows it, unless that has calls in it
            after = opening
            yield from self._say(self._text[:after])
        else:
            self._space, self._said, self._trims = "", True, True
            yield from calls
        self._text = self._text[after:]

    def _say(self, text: str) -> Iterator[Part]:
        """Content; white space at its end waits for more of it."""
        text = self._space + text
        if self._trims:
            text = text.lstrip()
        certain = text.rstrip()
        self._space = text[len(certain) :]
        if certain:
            self._said, self._trims = True, False
            if self._calls_first:
                self._sections = ()
            yield Text("content", certain)


def held_back(text: str, words: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of one of the words."""
    longest = max(map(len, words), default=0) - 1
    ends = range(max(0, len(text) - longest), len(text))
    return next((len(text) - at for at in ends if any(word.startswith(text[at:]) for word in words)), 0)


def _ends(text: str, mark: str, start: int) -> Iterator[int]:
    """Where a mark stands in a text; nowhere for an empty one."""
    if not mark:
        return
    at = text.find(mark, start)
    while at >= 0:
        yield at
        at = text.find(mark, at + len(mark))
