"""The bytes that each token of a tokenizer adds to a text.

Tokenizers keep their tokens in forms of their own: characters that stand for bytes (byte-level BPE), a mark for a space
(SentencePiece), a mark for "no space" (WordPiece). What counts here is what a token adds to the text of an answer as it
is decoded. Some decoders treat the first token apart: it loses its leading space.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

from pocketmoe.jsonfile import is_object

SPECIAL = b"\xff"  # before the name of a token that is no part of a text: no text has this byte
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_AT_ONCE = 4096  # tokens
_LEAST_ANCHORS = 512  # of the first tokens, one of which is a word that others can follow


@dataclass(frozen=True)
class Vocabulary:
    """Bytes by token id. Empty: it adds nothing, or there is no such token."""

    tokens: tuple[bytes, ...]
    first: Mapping[int, bytes]  # of tokens that add something else at the start of a text
    special: frozenset[int]  # ids of tokens that are no part of a text; their bytes are SPECIAL and their name


def read_vocabulary(tokenizer: tokenizers.Tokenizer, size: int, ends: Sequence[int]) -> Vocabulary:
    """The vocabulary of a model with `size` rows of logits, whose texts end with one of `ends`."""
    names = [tokenizer.id_to_token(token) for token in range(size)]
    hidden = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special} | {*ends}
    special = frozenset(token for token in hidden if token < size and names[token])
    decoder: Any = json.loads(tokenizer.to_str())["decoder"]
    steps = _steps(decoder)
    first: dict[int, bytes] = {}
    if "ByteLevel" in steps:
        table = _byte_level_table()
        tokens = [_byte_level(name, table) for name in names]
    else:
        tokens, first = _decoded(tokenizer, names, "ByteFallback" in steps)
    for token in special:
        tokens[token] = SPECIAL + (names[token] or "").encode()
        first.pop(token, None)
    return Vocabulary(tuple(tokens), first, special)


def _steps(decoder: Any) -> set[str]:
    steps: list[Any] = decoder.get("decoders", [decoder]) if is_object(decoder) else []
    return {str(step["type"]) for step in steps}


def _byte_level_table() -> dict[str, int]:
    """Which byte a character stands for, by the table of GPT-2: printable ones for themselves, others from 256 up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _byte_level(name: str | None, table: Mapping[str, int]) -> bytes:
    """As the decoder has it: a token with a character that stands for no byte is text as it is."""
    if not name:
        return b""
    found = [table.get(character) for character in name]
    return name.encode() if None in found else bytes(byte for byte in found if byte is not None)


def _decoded(
    tokenizer: tokenizers.Tokenizer, names: Sequence[str | None], falls_back: bool
) -> tuple[list[bytes], dict[int, bytes]]:
    """What tokens add behind another one, and where that differs, at the start: by decoding them there."""
    anchor = _anchor(tokenizer, names)
    before = tokenizer.decode([anchor])
    tokens, first = [b""] * len(names), dict[int, bytes]()
    for start in range(0, len(names), _AT_ONCE):
        ids = [token for token in range(start, min(start + _AT_ONCE, len(names))) if names[token] is not None]
        behind = tokenizer.decode_batch([[anchor, token] for token in ids])
        alone = tokenizer.decode_batch([[token] for token in ids])
        for token, both, one in zip(ids, behind, alone, strict=True):
            byte = _BYTE.fullmatch(names[token] or "") if falls_back else None
            if byte and int(byte[1], 16) >= 0x80:  # part of a character, which no decoder can show
                tokens[token] = bytes.fromhex(byte[1])
                continue
            tokens[token] = both[len(before) :].encode() if both.startswith(before) else b""
            if one.encode() != tokens[token]:
                first[token] = one.encode()
    return tokens, first


def _anchor(tokenizer: tokenizers.Tokenizer, names: Sequence[str | None]) -> int:
    """A token whose text stays as it is, whatever follows it."""
    for token in range(min(len(names), _LEAST_ANCHORS * 64)):
        text = tokenizer.decode([token]) if names[token] else ""
        if text[-1:].isalpha() and tokenizer.decode([token, token]).startswith(text):
            return token
    return 0
