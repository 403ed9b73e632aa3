"""Text to token ids and back, with the bundle's own tokenizer and chat template.

A tokenizer comes from strangers and is run by native code: what it does to a text is done in a child process with
limits, and so is its first loading, so that a crash or a bomb is an error. The children end before the engine opens.
A child costs 3 to 6 ms beside its work; of a vocabulary of 150,000 words, 0.34 s at the first loading (`rehearsed`).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection
from functools import cached_property
from typing import Any

import numpy as np
import tokenizers

from pocketmoe.bundle.reader import Bundle
from pocketmoe.chat_template.template import ChatTemplate
from pocketmoe.errors import BadInput, DamagedFile
from pocketmoe.grammar.constraint import Constraint
from pocketmoe.grammar.guide import Guide, Guides
from pocketmoe.isolated import IsolatedFailure, Limits, isolated
from pocketmoe.jsonfile import is_object
from pocketmoe.runtime.memory.budget import trim
from pocketmoe.runtime.rehearsed import note_rehearsal, was_rehearsed
from pocketmoe.runtime.text_stream import TextStream
from pocketmoe.tools.families import Dialect, dialect
from pocketmoe.tools.speech import with_free_reasoning

TOKENIZER = "tokenizer/tokenizer.json"

LEAST_MEMORY_BYTES, _LEAST_CPU_S = 512 << 20, 20
_BYTES_PER_BYTE = 32  # of memory, for a tokenizer.json; real ones take 15 to 20
_BYTES_PER_CHARACTER = 1024  # of memory, for a text; real ones take 60 to 300
_CHARACTERS_PER_S = 50_000  # of processor time; real ones do 500,000 and more
_IDS_TRIED = 2048  # of which a tokenizer makes text before it is trusted to


class Text:
    """A bundle's tokenizer."""

    def __init__(self, bundle: Bundle) -> None:
        """Raises DamagedFile when the tokenizer cannot be read, or not within its limits of memory and time."""
        self._path = path = bundle.check_file(TOKENIZER)
        self._vocab_size = bundle.manifest.model.vocab_size
        checked = bundle.manifest.tokenizer
        self._splits_special_tokens = checked is not None and checked.split_special_tokens
        try:
            if not was_rehearsed(bundle, TOKENIZER):
                isolated(self._rehearse, _limits(file_bytes=path.stat().st_size))
                note_rehearsal(bundle, TOKENIZER)
            self._tokenizer = self._load()
        except (IsolatedFailure, OSError) as error:
            raise DamagedFile(path, f"cannot be read ({error})") from error
        self._bundle = bundle
        self._guides: Guides | None = None  # once an answer was held to something
        self._making_guides = threading.Lock()

    def _load(self) -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer.from_file(str(self._path))
        tokenizer.no_truncation()  # which older exports left in the file
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = self._splits_special_tokens
        return tokenizer

    def _rehearse(self) -> bytes:
        """In a child: load, and make text of ids once."""
        tokenizer = self._load()
        tokenizer.decode(list(range(min(tokenizer.get_vocab_size(), _IDS_TRIED))))
        return b""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids, by default with the special tokens that the tokenizer adds to a text.

        Raises BadInput for a text that is not UTF-8, that the tokenizer cannot take or makes no tokens of, and for ids
        that the model has no embedding of.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadInput("the text holds bytes that are not UTF-8", "Save or type it in UTF-8.") from error

        def encode() -> bytes:
            return np.array(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids, "<u4").tobytes()

        try:
            ids = np.frombuffer(isolated(encode, _limits(characters=len(text))), "<u4").tolist()
        except IsolatedFailure as failure:
            raise BadInput(f"{self._path}: this tokenizer cannot take the text ({failure})", _OTHER_TEXT) from failure
        if not ids:
            raise BadInput("the text becomes no tokens", "Give some more text.")
        largest = max(ids)
        if largest >= self._vocab_size:
            token = self._tokenizer.id_to_token(largest)
            raise BadInput(
                f"the text holds {token!r}, token {largest}, but the model knows only those below {self._vocab_size}",
                "Leave it out.",
            )
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without special tokens."""
        return self._tokenizer.decode(ids)

    def name(self, token: int) -> str:
        """What the vocabulary calls a token; nothing for one that it does not have."""
        return self._tokenizer.id_to_token(token) or ""

    def term(self, mark: str) -> str:
        """How a grammar calls a mark: as the special token of that name where there is one, else as text."""
        added = self._tokenizer.get_added_tokens_decoder()
        special = [token for token, found in added.items() if found.special and found.content == mark]
        return f"<[{special[0]}]>" if special else json.dumps(mark)

    def guide(self, constraint: Constraint, rendered: str | None = None) -> Guide:
        """What holds an answer to a constraint, from its start on; the model's reasoning before it is free.

        `rendered`: what the chat template has made of the prompt. Raises BadInput for what cannot be held.
        """
        constraint = with_free_reasoning(constraint, self.dialect, rendered, self.term)
        with self._making_guides:
            if self._guides is None:
                ends = self._bundle.manifest.model.eos_token_ids
                self._guides = Guides(self._tokenizer, self._vocab_size, ends)
            guide = self._guides.guide(constraint)
        trim()  # what only the making took
        return guide

    def stream(self, marks: Collection[str] = ()) -> TextStream:
        """What turns an answer's tokens into text as they come; special tokens only where their names are `marks`."""
        tokens = self._tokenizer
        special = {token: added.content for token, added in tokens.get_added_tokens_decoder().items() if added.special}
        single_bytes = {tokens.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
        return TextStream(
            self.decode,
            shown=lambda token: token not in special and tokens.id_to_token(token) is not None,
            is_byte=single_bytes.__contains__,
            settles_after=settles_after(json.loads(tokens.to_str())["decoder"]),
            marks={token: name for token, name in special.items() if name in marks},
        )

    @cached_property
    def dialect(self) -> Dialect:
        """In what form the model writes reasoning and calls, as its chat templates show it."""
        return dialect(self.chat.source if self.chat else None)

    @cached_property
    def chat(self) -> ChatTemplate | None:
        """The model's chat templates. Raises DamagedFile when they cannot be read."""
        return ChatTemplate.open(self._bundle)


_OTHER_TEXT = "Try another text, or export the model again."


def _limits(*, file_bytes: int = 0, characters: int = 0) -> Limits:
    """What a child may use to load a tokenizer's file of that size, or to encode a text of that length."""
    memory = LEAST_MEMORY_BYTES + _BYTES_PER_BYTE * file_bytes + _BYTES_PER_CHARACTER * characters
    seconds = _LEAST_CPU_S + characters // _CHARACTERS_PER_S
    return Limits(memory, seconds, wall_s=6 * seconds)  # which a machine that is busy otherwise may need


def settles_after(decoder: Any) -> int:
    """How many characters at the end of a text a later token may change: some where whole texts are searched.

    A decoder that replaces in the text of all tokens (as for spaces before punctuation) has its rules after "Fuse".
    """
    steps: list[Any] = decoder.get("decoders", []) if is_object(decoder) else []
    kinds = [step["type"] for step in steps]
    if "Fuse" not in kinds:
        return 0
    rules = [step for step in steps[kinds.index("Fuse") :] if step["type"] == "Replace"]
    return sum(len(str(step["pattern"].get("String") or "") or "x" * 16) for step in rules)
