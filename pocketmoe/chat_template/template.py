"""A conversation as the text that a model was trained on: its own chat template, by the rules of transformers.

A template comes from strangers. It runs in a sandbox that counts its steps and the bytes it makes
(`meter.py`), and cannot change what it is given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextvars import copy_context
from pathlib import Path
from typing import Any, cast

from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import BadInput, DamagedFile
from pocketmoe.jsonfile import is_array, is_object, parse_object

DEFAULT = "tokenizer/chat_template.jinja"
OTHERS = "tokenizer/additional_chat_templates/"  # NAME.jinja
MAX_TEMPLATE_BYTES = 256 << 10  # ten times the largest that is known
MAX_TEMPLATES = 32

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG "
_REMEDY = "Use --raw to give the prompt as it is."

Message = Mapping[str, Any]


class ChatTemplate:
    """The chat templates of one model, compiled when they are first used."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str], origin: str) -> None:
        """`sources`: templates by name, `default` among them or alone. `origin`: what errors call them."""
        self._sources = dict(sources)
        self._special_tokens = dict(special_tokens)
        self._origin = origin
        self._compiled: dict[str, Any] = {}

    @classmethod
    def open(cls, bundle: Bundle) -> ChatTemplate | None:
        """A bundle's templates; None where it has none. Raises DamagedFile when a file cannot be read."""
        names = [name for name in bundle.manifest.files if name == DEFAULT or _is_named(name)]
        if not names:
            return None
        if len(names) > MAX_TEMPLATES:
            raise DamagedFile(bundle.root, f"has more than {MAX_TEMPLATES} chat templates")
        sources = {_name(name): _read_template(bundle.check_file(name)) for name in names}
        return cls(sources, _special_tokens(bundle), str(bundle.root / names[0]))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._sources))

    @property
    def source(self) -> str:
        """All templates, one after the other: what shows how the model writes."""
        return "\n".join(self._sources.values())

    def mentions(self, variable: str) -> bool:
        """Whether any of the templates has that word: one that does not cannot depend on it."""
        return any(re.search(rf"\b{re.escape(variable)}\b", source) for source in self._sources.values())

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation, special tokens included: encode it without adding any.

        `messages`: each with `role` and, usually, `content`; entries that are None count as absent.
        `tools`: JSON schemas. `template`: one of `names`; by default `tool_use` for tools, if there, else `default`.
        `variables`: what else a template asks for, such as `enable_thinking`; they win over the special tokens.
        Raises BadInput when the template fails, takes more than the limits allow, or yields nothing.
        """
        if add_generation_prompt and continue_final_message:
            raise BadInput("a message is either continued or answered", "Choose one.")
        if not messages:
            raise BadInput("the conversation is empty", "Give at least one message.")
        name = self._choose(template, tools)
        given = {**self._special_tokens, **variables}
        try:
            chat = [_message(message) for message in messages]
            if continue_final_message:
                _mark_end(chat)
            given |= {
                "messages": chat,
                "tools": None if tools is None else list(tools),
                "documents": None if documents is None else list(documents),
                "add_generation_prompt": add_generation_prompt,
            }
            text = copy_context().run(self._run, name, given)
            if continue_final_message:
                text = _cut_at_mark(text, messages[-1])
            text.encode("utf-8")
        except Exception as error:  # a template can raise whatever Python raises
            raise BadInput(f"{self._origin}: the chat template fails ({_reason(error)})", _REMEDY) from error
        if not text:
            raise BadInput(f"{self._origin}: the chat template yields no text", _REMEDY)
        return text

    def _choose(self, name: str | None, tools: Any) -> str:
        if name is None:
            name = "tool_use" if tools is not None and "tool_use" in self._sources else "default"
        if name not in self._sources:
            raise BadInput(
                f"{self._origin}: no chat template is called {name!r}", f"There are: {', '.join(self.names)}."
            )
        return name

    def _run(self, name: str, given: Mapping[str, Any]) -> str:
        from pocketmoe.chat_template.meter import CURRENT, Meter
        from pocketmoe.chat_template.sandbox import MeteredEnvironment

        given = _plain(given)
        if name not in self._compiled:
            self._compiled[name] = MeteredEnvironment().from_string(self._sources[name])
        CURRENT.set(Meter(*given.values()))
        return self._compiled[name].render(given)


def _message(message: Message) -> dict[str, Any]:
    """As transformers has it: without what is None, and with reasoning under each of the names that templates use."""
    if not isinstance(message, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance] ; callers need no types
        raise TypeError("a message is a mapping with role and content")
    present = {name: value for name, value in message.items() if value is not None}
    reasoning = next((present[name] for name in _REASONING if name in present), None)
    return present if reasoning is None else {"thinking": reasoning, **present, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """A fresh copy of JSON-like data in Python's own types, so that a template reaches no methods but theirs.

    Raises TypeError for anything else.
    """
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    if isinstance(value, Mapping):
        mapping = cast("Mapping[object, object]", value)
        return {_plain(key): _plain(item) for key, item in mapping.items()}
    if is_array(value):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in cast("tuple[object, ...]", value))
    raise TypeError(f"a {type(value).__name__} is no part of a conversation")


def _mark_end(chat: list[dict[str, Any]]) -> None:
    content = chat[-1].get("content")
    if isinstance(content, str):
        chat[-1]["content"] = content + _CONTINUED
        return
    parts = [dict(part) for part in content or ()]
    part = next(part for part in reversed(parts) if "text" in part)
    part["text"] += _CONTINUED
    chat[-1]["content"] = parts


def _cut_at_mark(text: str, message: Message) -> str:
    place = text.rfind(_CONTINUED.strip())
    if place < 0:
        raise ValueError(f"it leaves out the last message, by {str(message.get('role'))!r}")
    cut = text[:place]
    return cut if text.startswith(_CONTINUED, place) else cut.rstrip()


def _reason(error: Exception) -> str:
    """What went wrong, in at most 200 characters of what may be a stranger's text."""
    from jinja2 import TemplateError

    from pocketmoe.chat_template.meter import LimitExceeded

    text = str(error)[:200].strip()
    if isinstance(error, TemplateError | LimitExceeded) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _is_named(file: str) -> bool:
    return file.startswith(OTHERS) and file.endswith(".jinja") and "/" not in file.removeprefix(OTHERS)


def _name(file: str) -> str:
    return "default" if file == DEFAULT else Path(file).name.removesuffix(".jinja")


def _read_template(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(MAX_TEMPLATE_BYTES + 1)
    if len(data) > MAX_TEMPLATE_BYTES:
        raise DamagedFile(path, f"has more than {MAX_TEMPLATE_BYTES:,} bytes", _REMEDY)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedFile(path, f"is not UTF-8 (byte {error.start})", _REMEDY) from error


def _special_tokens(bundle: Bundle) -> dict[str, str]:
    """By name, as `bos_token`. Exports write them as transformers has them; older ones copied what the author wrote."""
    tokens: dict[str, str] = {}
    for name in ("tokenizer/special_tokens_map.json", "tokenizer/tokenizer_config.json"):
        found = _texts(_read_json(bundle, name)) if name in bundle.manifest.files else {}
        tokens |= {key: token for key, token in found.items() if key in _SPECIAL and key not in tokens}
    return tokens


def _texts(settings: dict[str, Any]) -> dict[str, str]:
    """The settings that are texts, or added tokens with their text inside."""
    contents = {name: value.get("content") if is_object(value) else value for name, value in settings.items()}
    return {name: text for name, text in contents.items() if isinstance(text, str)}


def _read_json(bundle: Bundle, name: str) -> dict[str, Any]:
    path = bundle.check_file(name)
    return parse_object(path.read_bytes(), path, "")
