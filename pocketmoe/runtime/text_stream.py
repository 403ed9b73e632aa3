"""The text of an answer, piece by piece as its tokens come: no piece is lost, and no bytes make it fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

_LONGEST_WINDOW = 32  # tokens
_CONTEXT = 8  # tokens that stay in the window: a character has at most four bytes, a token at least one
_NONE: Mapping[int, str] = MappingProxyType({})
_BROKEN = "\ufffd"


class TextStream:
    """Pieces whose concatenation is the decoding of all tokens at once.

    Only the last tokens are decoded again. A piece is given once no later token can change it: bytes that are part of
    a character wait for the rest of it, and single-byte tokens (as SentencePiece's <0x0A>) for the first token that is
    none, since a tokenizer judges them together. Bytes that make no character become U+FFFD.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        *,
        shown: Callable[[int], bool],
        is_byte: Callable[[int], bool],
        settles_after: int = 0,
        marks: Mapping[int, str] = _NONE,
    ) -> None:
        """`decode`: the text of token ids. `shown`: whether a token is part of a text, as special ones are not.

        `settles_after`: how many characters at the end later tokens may change, where all of a text is decoded
        together (spaces before punctuation are taken out); 0 where they cannot. `marks`: special tokens that are shown
        by their names all the same.
        """
        self._decode, self._shown, self._is_byte = decode, shown, is_byte
        self._settles_after, self._marks = settles_after, marks
        self._window: list[int] = []
        self._given = 0  # characters of the window's text
        self._longest = _LONGEST_WINDOW

    def push(self, token: int) -> str:
        """The text that has become certain; often none."""
        if token in self._marks:
            return self.finish() + self._marks[token]
        if not self._shown(token):
            return ""
        self._window.append(token)
        if self._is_byte(token):
            return ""
        text = self._decode(self._window)
        certain = len(text) - self._settles_after
        if certain > 0 and text[certain - 1] == _BROKEN:
            certain -= 1
        certain = max(certain, self._given)
        piece = text[self._given : certain]
        self._given = certain
        if len(self._window) > self._longest and not self._settles_after:
            self._shorten(len(text) - self._given)
        return piece

    def finish(self) -> str:
        """The rest, once the last token has come."""
        piece = self._decode(self._window)[self._given :] if self._window else ""
        self._window, self._given = [], 0
        return piece

    def _shorten(self, pending: int) -> None:
        """Drop tokens whose text was given, but for some: what a decoder does to the first is done to those.

        The window may not begin within single-byte tokens, nor with tokens without a text.
        """
        last = len(self._window) - _CONTEXT
        for start in range(last, max(0, last - _CONTEXT), -1):
            text = "" if self._is_byte(self._window[start]) else self._decode(self._window[start:])
            if len(text) - pending >= _CONTEXT // 2:
                self._window, self._given = self._window[start:], len(text) - pending
                self._longest = _LONGEST_WINDOW
                return
        self._longest = len(self._window) + _CONTEXT
