"""Streamed text: the pieces together are what decoding all tokens at once gives, for every kind of tokenizer."""

# pyright: reportArgumentType=false

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from pocketmoe.runtime.text_stream import TextStream
from pocketmoe.runtime.tokenizer import settles_after

WORDS = ["a", "b", "the", "do", "n", "'", "s", ".", ",", "?", "é", "中", "👩‍🦰", "\ufffd", "x y", "   "]
RULES = ((" .", "."), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 's", "'s"), (" 've", "'ve"))


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["".join(chars) for chars in zip(alphabet, alphabet[7:] + alphabet[:7], strict=True)]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate([*alphabet, *pieces])}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback(decoder: Any) -> Tokenizer:
    """As Mixtral's and Gemma's: U+2581 for spaces, every byte as <0xNN>."""
    vocab = {"<unk>": 0, **{f"<0x{n:02X}>": 1 + n for n in range(256)}}
    for word in ["\u2581", *WORDS, *(f"\u2581{word}" for word in WORDS)]:
        vocab.setdefault(word, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([*decoder])
    return tokenizer


def word_piece(decoder: Any) -> Tokenizer:
    vocab = {"[UNK]": 0}
    for word in [*WORDS, *(f"##{word}" for word in WORDS)]:
        vocab.setdefault(word, len(vocab))
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoder
    return tokenizer


def words(suffix: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word + suffix * (i % 2): i for i, word in enumerate(WORDS)}, "a"))
    if suffix:
        tokenizer.decoder = decoders.BPEDecoder(suffix)
    return tokenizer


def tokenizer_of(kind: str) -> Tokenizer:
    space = decoders.Replace("\u2581", " ")
    tokenizer = {
        "byte level": byte_level,
        "llama": lambda: byte_fallback([space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
        "gemma": lambda: byte_fallback([space, decoders.ByteFallback(), decoders.Fuse()]),
        "metaspace": lambda: byte_fallback([decoders.ByteFallback(), decoders.Metaspace()]),
        "word piece": lambda: word_piece(decoders.WordPiece()),
        "cleaned up": lambda: word_piece(
            decoders.Sequence(
                [decoders.WordPiece(cleanup=False), decoders.Fuse(), *(decoders.Replace(*r) for r in RULES)]
            )
        ),
        "no decoder": lambda: words(""),
        "suffixes": lambda: words("</w>"),
    }[kind]()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("é ü", special=False)])
    return tokenizer


KINDS = ["byte level", "llama", "gemma", "metaspace", "word piece", "cleaned up", "no decoder", "suffixes"]
TOKENIZERS = {kind: tokenizer_of(kind) for kind in KINDS}


def stream_of(tokenizer: Tokenizer, decoded: list[int] | None = None) -> TextStream:
    """As `Text.stream` makes it; `decoded` collects how many tokens were decoded each time."""
    hidden = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    single = {tokenizer.token_to_id(f"<0x{n:02X}>") for n in range(256)}

    def decode(ids: list[int]) -> str:
        if decoded is not None:
            decoded.append(len(ids))
        return tokenizer.decode(ids)

    return TextStream(
        decode,
        shown=lambda i: i not in hidden and tokenizer.id_to_token(i) is not None,
        is_byte=single.__contains__,
        settles_after=settles_after(json.loads(tokenizer.to_str())["decoder"]),
    )


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pieces_together_are_all_tokens_decoded(kind: str, data: st.DataObject) -> None:
    """For any ids, among them special, unknown and half characters; and no piece is a broken string."""
    tokenizer = TOKENIZERS[kind]
    size = tokenizer.get_vocab_size()
    some = data.draw(st.lists(st.integers(0, size + 2), min_size=1, max_size=6))
    ids = data.draw(st.lists(st.integers(0, size + 2) | st.sampled_from(some), max_size=150))
    stream = stream_of(tokenizer)
    pieces = [*map(stream.push, ids), stream.finish()]
    assert "".join(pieces) == tokenizer.decode(ids)
    "".join(pieces).encode("utf-8")


@pytest.mark.parametrize("kind", ["byte level", "llama", "gemma"])
def test_text_comes_as_soon_as_it_is_certain(kind: str) -> None:
    """Each token of a plain text gives its piece at once; only bytes wait."""
    tokenizer = TOKENIZERS[kind]
    stream = stream_of(tokenizer)
    ids = [tokenizer.token_to_id("a"), tokenizer.token_to_id("b")] * 50
    assert all(stream.push(token) for token in ids)
    assert stream.finish() == ""


def test_half_a_character_waits_for_the_rest() -> None:
    """Four single bytes of an emoji: nothing, then all of it with the next token; alone, one U+FFFD each."""
    tokenizer = TOKENIZERS["llama"]
    emoji = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "🦰".encode()]
    stream = stream_of(tokenizer)
    assert [*map(stream.push, [*emoji, tokenizer.token_to_id("a")])] == ["", "", "", "", "🦰a"]
    assert [*map(stream.push, emoji[:2])] == ["", ""]
    assert stream.finish() == "\ufffd\ufffd"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "cleaned up"])
def test_a_token_costs_the_same_however_long_the_text(kind: str) -> None:
    """Of 2,000 tokens at most 40 times as many are decoded, also of bytes that are no text."""
    tokenizer = TOKENIZERS[kind]
    words = [tokenizer.token_to_id(token) for token in ("a", "b", "the") if tokenizer.token_to_id(token) is not None]
    broken = [tokenizer.token_to_id(token) for token in ("<0x80>", "Ģ") if tokenizer.token_to_id(token) is not None]
    for ids in (words * 1000, (broken or words) * 2000, [*(broken or words) * 500, *words * 500]):
        decoded: list[int] = []
        stream = stream_of(tokenizer, decoded)
        text = "".join(map(stream.push, ids[:2000])) + stream.finish()
        assert text == tokenizer.decode(ids[:2000])
        assert sum(decoded) < 40 * 2000


def test_streaming_is_where_decode_stream_fails() -> None:
    """The library's own DecodeStream raises for a byte that turns out to be none; this one does not."""
    tokenizer = TOKENIZERS["llama"]
    ids = [tokenizer.token_to_id(token) for token in ("<0x0A>", "<0xFF>", "\u2581the")]
    theirs = decoders.DecodeStream(skip_special_tokens=True)
    with pytest.raises(Exception, match="Invalid prefix"):
        [theirs.step(tokenizer, token) for token in ids]
    stream = stream_of(tokenizer)
    assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids) == "\ufffd\ufffd the"
