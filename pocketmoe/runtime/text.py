"""Text to token ids and back, with the bundle's own tokenizer and chat template."""

from __future__ import annotations

from functools import cached_property

import tokenizers

from pocketmoe.bundle import Bundle
from pocketmoe.errors import DamagedFile
from pocketmoe.chat.template import ChatTemplate
from pocketmoe.runtime.text_stream import TextStream

TOKENIZER = "tokenizer/tokenizer.json"


class Text:
    """A bundle's tokenizer."""

    def __init__(self, bundle: Bundle) -> None:
        """Raises DamagedFile when the tokenizer cannot be read."""
        path = bundle.check_file(TOKENIZER)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise DamagedFile(path, f"cannot be read ({error})") from error
        self._bundle = bundle

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds to a text."""
        return self._tokenizer.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

    def encode_chat(self, text: str) -> list[int]:
        """Token ids of a rendered conversation, which has its special tokens already."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def stream(self) -> TextStream:
        """What turns an answer's tokens into text as they come."""
        tokens = self._tokenizer
        hidden = {token for token, added in tokens.get_added_tokens_decoder().items() if added.special}
        single_bytes = {tokens.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
        return TextStream(
            self.decode,
            shown=lambda token: token not in hidden and tokens.id_to_token(token) is not None,
            is_byte=single_bytes.__contains__,
        )

    @cached_property
    def chat(self) -> ChatTemplate | None:
        """The model's chat templates. Raises DamagedFile when they cannot be read."""
        return ChatTemplate.open(self._bundle)
