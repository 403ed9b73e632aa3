"""The channels of gpt-oss (OpenAI's Harmony): analysis is reasoning, what goes to a function is a call.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json
    <|message|>{...}<|call|>
    <|channel|>final<|message|>...<|return|>

A message that is no call, though it should be, comes out as content.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from pocketmoe.tools.arguments import read_object
from pocketmoe.tools.calls import Part, Text, Tool, ToolCall
from pocketmoe.tools.sections import held_back

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
MARKS = (START, CHANNEL, CONSTRAIN, MESSAGE, *ENDS)
_RECIPIENT = re.compile(r"to=(?:functions\.)?([^\s<]+)")


class Harmony:
    """Parts of an answer, as its text, with all its special tokens, arrives."""

    def __init__(self, tools: Sequence[Tool] = (), begun: bool = False) -> None:  # noqa: ARG002
        """`tools` and `begun` are for other families: here the channels say it all."""
        self._text = ""  # what is not said yet
        self._header = ""  # of the message that is being read
        self._in_header = True
        self._call = ""  # the text of a message to a function

    def push(self, piece: str) -> list[Part]:
        """The parts that have become certain."""
        self._text += piece
        return [*self._read(is_end=False)]

    def finish(self) -> list[Part]:
        """The rest, once no more pieces come."""
        return [*self._read(is_end=True)]

    def _read(self, is_end: bool) -> Iterator[Part]:
        while True:
            if self._in_header and not self._begins_header():
                if not self._text.strip():
                    return
                self._header, self._in_header = "final", False
            marks = [MESSAGE] if self._in_header else [*ENDS, START]
            places = [(at, mark) for mark in marks if (at := self._text.find(mark)) >= 0]
            if not places:
                yield from self._rest(marks, is_end)
                return
            at, mark = min(places)
            before, self._text = self._text[:at], self._text[at if mark == START else at + len(mark) :]
            if self._in_header:
                self._header, self._in_header = before, False
            else:
                yield from self._say(before)
                yield from self._end()

    def _begins_header(self) -> bool:
        """Whether what comes is a message's header, as far as can be told by now."""
        text = self._text.lstrip()
        return bool(text) and any(text.startswith(word) or word.startswith(text) for word in (START, CHANNEL, "to="))

    def _rest(self, marks: Sequence[str], is_end: bool) -> Iterator[Part]:
        """What is left without a mark."""
        if self._in_header:
            if is_end and self._text.strip() not in ("", START, f"{START}assistant"):  # a message without its text
                yield Text("content", self._text)
                self._text = ""
            return
        keep = 0 if is_end else held_back(self._text, marks)
        certain, self._text = self._text[: len(self._text) - keep], self._text[len(self._text) - keep :]
        yield from self._say(certain)
        if is_end:
            yield from self._end()

    def _say(self, text: str) -> Iterator[Part]:
        if not text:
            return
        if _RECIPIENT.search(self._header):
            self._call += text
        else:
            yield Text("reasoning" if "analysis" in self._header else "content", text)

    def _end(self) -> Iterator[Part]:
        """A message has ended."""
        recipient = _RECIPIENT.search(self._header)
        if recipient:
            arguments = read_object(self._call)
            if arguments is None:
                yield Text("content", f"{self._header}{MESSAGE}{self._call}")
            else:
                yield ToolCall.of(recipient[1], arguments)
        self._header, self._call, self._in_header = "", "", True
