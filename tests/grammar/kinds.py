"""Small tokenizers of every kind, each with all bytes or all characters that the tests' texts have."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

WORDS = [
    "name",
    "age",
    "true",
    "false",
    "null",
    "the",
    "and",
    "colour",
    "é",
    "ab",
    "aab",
    "日本",
    '":',
    '{"',
    '"}',
    "12",
]
PRINTABLE = [chr(code) for code in range(0x20, 0x7F)]
END = "<|end|>"


def byte_level() -> Tokenizer:
    """As of GPT-2, Qwen, Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator([" ".join(WORDS) * 2, '{"name": "the", "age": 12}\n'], trainer)
    tokenizer.add_tokens([AddedToken("<call>", special=False)])
    tokenizer.add_special_tokens([END])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As of Llama 2 and Mixtral: a mark for a space, bytes for what has no piece, no space before a text."""
    pieces = ["<unk>", END, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *(c for c in PRINTABLE if c != " ")]
    longer = [word for word in WORDS if word.isascii() and word.isalpha()]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges: list[tuple[str, str]] = []
    for word in ["▁", *longer, *(f"▁{word}" for word in longer)]:
        for length in range(2, len(word) + 1):
            left, right = word[: length - 1], word[length - 1]
            if left + right not in vocabulary:
                vocabulary[left + right] = len(vocabulary)
                merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", END])
    return tokenizer


def metaspace() -> Tokenizer:
    """As of T5: pieces with a mark for a space, which the first one loses."""
    pieces = [("<unk>", 0.0), (END, 0.0), *((piece, -5.0) for piece in ("▁", *PRINTABLE[1:]))]
    pieces += [(word, -3.0) for word in WORDS if word.isalpha()]
    pieces += [(f"▁{word}", -2.0) for word in WORDS if word.isalpha()]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", END])
    return tokenizer


def word_piece() -> Tokenizer:
    """As of BERT: a space before each token but for those with ##, and none before punctuation."""
    pieces = ["[UNK]", END, *PRINTABLE[1:], *(f"##{c}" for c in PRINTABLE[1:]), *WORDS, *(f"##{w}" for w in WORDS)]
    tokenizer = Tokenizer(
        models.WordPiece({piece: index for index, piece in enumerate(dict.fromkeys(pieces))}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", END])
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    made.__name__: made for made in (byte_level, byte_fallback, metaspace, word_piece)
}
