"""Two forms of one tokenizer are compared: on strings of every kind, all their added tokens, and made-up answers."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pocketmoe.errors import BadInput

# what any tokenizer must take; where one fails on these, no prompt will do
PLAIN = (
    "Once upon a time",
    "The miller kept a ledger of every sack that crossed the bridge.",
    "hello",
    "Two  spaces, three   spaces.\nA new line.",
)
_STRINGS = (
    *PLAIN,
    "",
    " ",
    "  ",
    "   leading and trailing   ",
    "\n",
    "\n\n\n",
    "a\r\nb\rc\n d",
    "\tindented\t\ttwice ",
    "    def f(x):\n        return x[0] if x else None  # 'comment'\n",
    "it's we're I'm you've they'll he'd don't . , ? ! ' n't",
    "1234567890 3.14159 1,000,000 -5e-10 0x1F ½ ² Ⅷ ४२",
    "ALL CAPS, Title Case, camelCase, snake_case, kebab-case",
    "https://example.org/a?b=c&d=%20#e user@example.org C:\\path\\file",
    '{"key": [1, null, "va\\"lue"]} <a href="x">&amp;</a> $x^2$ `code`',
    "-- ... !!! ??? *** ___ ### === ||| ~~~ @@@ ^^^ &&&",
    "café cafe\u0301 Å A\u030a ﬁ ﬀ ǆ ẛ̣ ß İ ı",
    "ｆｕｌｌｗｉｄｔｈ　ｔｅｘｔ １２３ ｶﾞ ガ",
    "東京は日本の首都です。我喜欢读书。 한국어 텍스트 한글",
    "Съешь ещё этих булок ελληνικά עברית العَرَبِيَّة हिन्दी ไทย தமிழ் ქართული",
    "😀 👩‍👩‍👧 🇩🇪 👍🏽 ☃️ ✈ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 🧑🏿‍🚀",
    "zero\u200bwidth\u200djoin\u200c\u2060 soft\u00adhyphen \ufeffbom \u202eright\u202c",
    "no\u00a0break thin\u2009space \u3000 line\u2028sep para\u2029sep next\u0085line",
    "\x00 \x01\x02\x07\x08\x0b\x0c\x1b[31m\x7f \x80\x9f",
    "\ufffd \ufffe \uffff \ue000 \U000f0000 \U0010ffff",
    "▁ ▁▁word ▁ Ġ Ċ Ġword ## ##ing </w> @@ <0x41> <0x0A> <0xFF> Ã© â€™",
    "<s> </s> <unk> <pad> [CLS] [SEP] [MASK] <|endoftext|> <bos> <eos> <mask>",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "[INST] hi [/INST] <<SYS>> x <</SYS>> <start_of_turn>user <|user|> <think>",
    "a" * 200,
    "ab" * 100 + " " * 40 + "." * 40,
    "Donaudampfschifffahrtsgesellschaftskapitän antidisestablishmentarianism",
)
_PIECES = (
    *"abcXYZ019.,!?'\"-_()[]{}<>|/\\@#%&*+=~^`:;",
    *(" ", " ", "  ", "   ", "\n", "\t", "\r\n", "\u00a0", "\u3000", "\u200b", "\x00", "\x1b"),
    *("the", " quick", "Brown ", "fox", "'s", " n't", "ing", "123", "é", "e\u0301", "ß", "ﬁ", "中", "文字", "한"),
    *("ا", "ש", "हि", "ไ", "😀", "👩‍👧", "𝔘", "▁", "Ġ", "##", "<0x41>", "<s>", "</s>", "<unk>", "<|x|>", "[CLS]"),
)
_MIXTURES = 250
_ANSWERS = 100
_IN_EVERY_PLACE = 100  # added tokens; of more than that, the rest are tried alone and twice

Ids = list[int]


@dataclass(frozen=True)
class Form:
    """A tokenizer as two functions: text to ids with the special tokens that it adds, and back without and with."""

    encode: Callable[[str], Ids]
    decode: Callable[[Ids, bool], str]  # skip special tokens


def strings(added: Sequence[str]) -> Iterator[str]:
    """The strings that are tried: the same at every call with the same added tokens."""
    yield from _STRINGS
    chance = random.Random(14)  # noqa: S311 - to be the same each time
    for _ in range(_MIXTURES):
        yield "".join(chance.choices(_PIECES, k=chance.randint(1, 24)))
    for index, token in enumerate(added):
        yield token
        yield token + token
        if index < _IN_EVERY_PLACE:
            yield f"inside{token}word"
            yield f" {token} "
            yield f"before   {token}   after"
            yield f"\n{token}\n{token}\tx {token}."
            yield token.lower() + " " + token.upper()
            yield token[:-1] + " " + token[1:]


def compare(theirs: Form, ours: Form, added: Sequence[str], n_ids: int, where: str) -> tuple[int, str]:
    """How many strings give the same ids and text in both, and a SHA-256 of the strings and their ids.

    `n_ids`: token ids, of which answers are made up. Raises BadInput that names the first string that does not, and
    where no text can be encoded.
    """
    digest, count = hashlib.sha256(), 0
    for text in strings(added):
        expected, found = _try(theirs.encode, text), _try(ours.encode, text)
        if isinstance(expected, _Failure) and text in PLAIN:
            raise BadInput(f"{where}: transformers cannot encode {text!r} with it ({expected})", _REPAIR)
        _refuse_other(where, f"for {text!r}", expected, found)
        if not isinstance(expected, _Failure):
            _compare_text(theirs, ours, expected, where)
        digest.update(json.dumps([text, expected]).encode())
        count += 1
    for answer in _answers(n_ids):
        _compare_text(theirs, ours, answer, where)
    return count, digest.hexdigest()


_REPAIR = "Put a tokenizer.json beside the weights that stands alone."


def _answers(n_ids: int) -> Iterable[Ids]:
    """What a model might say: ids at random, among them sequences that are no UTF-8."""
    chance = random.Random(41)  # noqa: S311 - to be the same each time
    for _ in range(_ANSWERS):
        yield [chance.randrange(n_ids) for _ in range(chance.randint(1, 16))]
        yield [chance.randrange(min(n_ids, 600)) for _ in range(chance.randint(1, 16))]


def _compare_text(theirs: Form, ours: Form, ids: Ids, where: str) -> None:
    for skip in (True, False):
        expected, found = _try(theirs.decode, ids, skip), _try(ours.decode, ids, skip)
        _refuse_other(where, f"for the ids {ids[:16]}", expected, found)


def _refuse_other(where: str, given: str, expected: object, found: object) -> None:
    """Raises BadInput where two answers differ; of two failures the wording may."""
    if isinstance(expected, _Failure) and isinstance(found, _Failure):
        return
    if expected != found:
        raise BadInput(
            f"{where}: as one tokenizer.json it would differ from transformers, {given[:120]}: "
            f"{_short(found)} instead of {_short(expected)}",
            _REPAIR,
        )


def _short(answer: object) -> str:
    text = repr(answer)
    return text if len(text) < 80 else f"{text[:80]}..."


class _Failure(str):
    """What a tokenizer says where it cannot answer."""


def _try(call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # noqa: BLE001 - a panic of `tokenizers` is none of Exception's
        return _Failure(str(error) or type(error).__name__)
