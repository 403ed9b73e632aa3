"""Text to token ids and back, with the bundle's own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tokenizers
from tokenizers.decoders import DecodeStream

from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import BadInput, DamagedFile

TOKENIZER = "tokenizer/tokenizer.json"
CHAT_TEMPLATE = "tokenizer/chat_template.jinja"


class Text:
    """A bundle's tokenizer."""

    def __init__(self, bundle: Bundle) -> None:
        """Raises DamagedFile when the tokenizer cannot be read."""
        path = bundle.check_file(TOKENIZER)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise DamagedFile(path, f"cannot be read ({error})") from error
        self._template = bundle.check_file(CHAT_TEMPLATE) if CHAT_TEMPLATE in bundle.manifest.files else None

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds to a text."""
        return self._tokenizer.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

    def stream(self) -> Callable[[int], str]:
        """A function that takes one token after the other and returns the text that has become certain."""
        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self._tokenizer, token) or ""

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def as_chat(self, prompt: str) -> str:
        """The prompt as a user's message in the model's own chat format. Raises BadInput when the template fails."""
        assert self._template is not None
        return _render(self._template, prompt)


def _render(template: Path, prompt: str) -> str:
    """A template comes from strangers: it runs in jinja's sandbox, and cannot change what it is given."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(template.read_text(encoding="utf-8")).render(
            messages=[{"role": "user", "content": prompt}], add_generation_prompt=True, bos_token="", eos_token=""
        )
    except (TemplateError, UnicodeDecodeError) as error:
        raise BadInput(
            f"{template}: the chat template fails ({error})", "Use --raw to give the prompt as it is."
        ) from error
