"""A compiled constraint, by llguidance: which tokens may come next, and which must.

The grammar is a stranger's, and so is compiled in a child process with limits first. Steps are bounded by llguidance's
own limits; what goes beyond them ends the answer with an error.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import tokenizers

from pocketmoe.errors import BadInput, install
from pocketmoe.grammar.constraint import Constraint
from pocketmoe.grammar.vocabulary import SPECIAL, Vocabulary, read_vocabulary
from pocketmoe.isolated import IsolatedFailure, Limits, isolated

if TYPE_CHECKING:
    import llguidance

_LIBRARY_BYTES = 8 << 20  # llguidance's code
_BYTES_PER_TOKEN = 360  # of the vocabulary as llguidance has it, and while it is handed over; 290 measured
_COMPILED_BYTES = 32 << 20  # a grammar and what it becomes while it is followed
_CPU_S = 20
_MOST_STATES = 10_000  # of the lexer, each of 1 to 2 kB
_SIMPLER = "Change it, or make it simpler: docs/STRUCTURED.md says what can be held."
_DEAD_END = "no text, or none that this model's tokens can spell, goes on as it says"
_LONGEST_REASON = 300  # characters
_SENTINEL = "\n"  # before a text that is to be encoded as if it were not the first


def is_available() -> bool:
    """Whether the extra is installed."""
    return importlib.util.find_spec("llguidance") is not None


def guide_bytes(vocab_size: int, guides: int = 1) -> int:
    """What structured output takes of memory, in bytes, at most, with so many guides at once."""
    return _LIBRARY_BYTES + _BYTES_PER_TOKEN * vocab_size + guides * _COMPILED_BYTES


class Guides:
    """Makes guides for answers of one model."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, vocab_size: int, ends: Sequence[int]) -> None:
        """`vocab_size`: numbers in a row of logits. Raises BadInput where llguidance is not installed."""
        if not is_available():
            raise BadInput("structured output needs llguidance", install("grammar"))
        self._tokenizer, self._size, self._ends = tokenizer, vocab_size, [end for end in ends if end < vocab_size]
        self._words: _Words | None = None

    def guide(self, constraint: Constraint) -> Guide:
        """A guide at the start of an answer.

        Raises BadInput for a grammar that cannot be held, that allows no answer, or that takes more than its limits.
        """
        grammar = constraint.grammar()

        def rehearse() -> bytes:
            self._compile(grammar, self._words or self._read_words(), constraint)
            return b""

        memory = guide_bytes(0 if self._words else self._size)
        try:
            isolated(rehearse, Limits(memory, _CPU_S, wall_s=6 * _CPU_S))
        except IsolatedFailure as failure:
            begin = f"the {_NAMES[constraint.kind]} cannot be held: "
            raise BadInput(begin + str(failure).removeprefix(begin), _SIMPLER) from failure
        if self._words is None:
            self._words = self._read_words()
        return self._compile(grammar, self._words, constraint)

    def _read_words(self) -> _Words:
        return _Words(self._tokenizer, read_vocabulary(self._tokenizer, self._size, self._ends), self._ends)

    @staticmethod
    def _compile(grammar: str, words: _Words, constraint: Constraint) -> Guide:
        import llguidance

        limits = llguidance.LLParserLimits(max_lexer_states=_MOST_STATES, verbose_errors=False)
        matcher = llguidance.LLMatcher(words.compiled, grammar, log_level=0, limits=limits)
        guide = Guide(matcher, words, _NAMES[constraint.kind])
        if guide.complete:
            raise BadInput(f"the {_NAMES[constraint.kind]} allows an empty answer alone", _SIMPLER)
        return guide


_NAMES = {
    "json_schema": "JSON schema",
    "regex": "regular expression",
    "grammar": "grammar",
    "tool_calls": "tools' calls",
}


class _Words:
    """A vocabulary as llguidance has it: after its own ids the other forms of first tokens, the end, and nothing.

    The end stands for all tokens that end a text, nothing for a text that no tokens spell; no model has these two.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, vocabulary: Vocabulary, ends: Sequence[int]) -> None:
        import llguidance

        self.size, self.ends = len(vocabulary.tokens), np.array(ends, np.int64)
        self.special = vocabulary.special
        self.first = {token: self.size + index for index, token in enumerate(vocabulary.first)}
        self.first_ids = np.array([*self.first], np.int64)
        self.end = self.size + len(self.first)
        tokens = [*vocabulary.tokens, *vocabulary.first.values(), b"", SPECIAL + b"nothing"]
        encoder = _Encoder(tokenizer, tokens, vocabulary.special)
        self.compiled = llguidance.LLTokenizer(encoder, eos_token=self.end, slices=[])  # type: ignore[arg-type]
        encoder.taken(self.compiled)


class Guide:
    """Follows an answer, token by token. `allowed`: bool [vocab], the tokens that may come next.

    `complete`: nothing can follow.
    """

    def __init__(self, matcher: llguidance.LLMatcher, words: _Words, name: str) -> None:
        """Raises BadInput for a grammar that cannot be held."""
        self._matcher, self._words, self._name = matcher, words, name
        self._is_first = bool(words.first)  # no token has been shown yet, where that makes a difference
        self._look()

    def accept(self, token: int) -> None:
        """The answer's next token, one of those that are allowed. An end of the text ends this guide's work too."""
        if token in self._words.ends:
            self.complete = True
        else:
            self._consume([token])
            self._look()

    def forced(self, most: int) -> list[int]:
        """Up to `most` tokens that the grammar makes the next ones, accepted at once."""
        if self.complete or most < 1:
            return []
        tokens = self._matcher.compute_ff_tokens()[:most]
        if not tokens or (self._is_first and tokens[0] in self._words.first):
            return []
        self._consume(tokens)
        self._look()
        return tokens

    def _consume(self, tokens: Sequence[int]) -> None:
        words = self._words
        given = [*tokens]
        if self._is_first and given[0] in words.first:
            given[0] = words.first[given[0]]
        if not self._matcher.consume_tokens(given):
            raise BadInput(f"the {self._name} cannot be held: {self._reason()}", _SIMPLER)
        if self._is_first and not words.special.issuperset(tokens):
            self._is_first = False

    def _look(self) -> None:
        words = self._words
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise BadInput(f"the {self._name} cannot be held: {self._reason()}", _SIMPLER)
        found = np.unpackbits(bits, count=words.end + 1, bitorder="little").view(bool)
        may_end = bool(found[words.end])
        self.allowed = found[: words.size].copy()
        if self._is_first:
            self.allowed[words.first_ids] = found[words.size : words.end]
        self.complete = not self.allowed.any()
        if self.complete and not may_end:
            raise BadInput(f"the {self._name} cannot be held: {_DEAD_END}", _SIMPLER)
        self.allowed[words.ends] |= may_end

    def _reason(self) -> str:
        """The line of llguidance's message that says most."""
        lines = self._matcher.get_error().strip().splitlines()
        saying = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        if any(line.startswith("NoExtension") for line in lines):
            return _DEAD_END
        return [*saying, *lines, "llguidance gives no reason"][0][:_LONGEST_REASON]


class _Encoder:
    """A tokenizer as llguidance asks for it: the bytes of all tokens, once, and then the ids of texts."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: tokenizers.Tokenizer, tokens: list[bytes], special: frozenset[int]) -> None:
        self._tokenizer, self._special = tokenizer, special
        self.tokens = tokens
        self.special_token_ids = [*sorted(special), len(tokens) - 1]
        self.eos_token_id, self._nothing = len(tokens) - 2, len(tokens) - 1

    def taken(self, compiled: llguidance.LLTokenizer) -> None:
        """llguidance has the bytes now."""
        self.tokens, self._compiled = [], compiled

    def __call__(self, text: str | bytes) -> list[int]:
        """The ids whose bytes are exactly those of the text, as the tokenizer has them within a longer text.

        Where there are none, a token that no model has: with no tokens at all llguidance takes the bytes for said.
        """
        text = text.decode() if isinstance(text, bytes) else text
        ids = self._tokenizer.encode(_SENTINEL + text, add_special_tokens=False).ids
        left = len(text.encode())
        start = len(ids)
        while start and left > 0:
            start -= 1
            left -= len(self._compiled.decode_bytes([ids[start]]))
        for mine in (ids[start:], self._compiled.greedy_tokenize(text)):
            if self._special.isdisjoint(mine) and self._compiled.decode_bytes(mine) == text.encode():
                return mine
        return [self._nothing]
