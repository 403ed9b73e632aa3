"""The chat templates of a checkpoint: found as transformers finds them, tried, and written into a bundle."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pocketmoe.errors import BadInput

DIRECTORY = "additional_chat_templates"
MAX_BYTES = 256 << 10
_MAX_TEMPLATES = 32
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_USER = {"role": "user", "content": "Hello"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
_TRIALS: dict[str, dict[str, Any]] = {
    "a user's message": {"messages": [_USER]},
    "a system message": {"messages": [{"role": "system", "content": "Be short."}, _USER]},
    "several turns": {"messages": [_USER, {"role": "assistant", "content": "Hi"}, _USER]},
    "tools": {"messages": [_USER], "tools": [_TOOL]},
}


def write(source: Path, directory: Path) -> tuple[str, ...]:
    """Write the chat templates and special tokens of `source` into `directory`; return notes for the bundle's user.

    Raises BadInput for a template that is no text. One that fails for every conversation is a note: `run --raw` works.
    """
    templates = find(source)
    if not templates:
        return ()
    tokenizer = _load(source)
    tokens = special_tokens(source, tokenizer)
    text = json.dumps(tokens, ensure_ascii=False, indent=2)
    (directory / "special_tokens.json").write_text(text + "\n", encoding="utf-8")
    for name, template in templates.items():
        path = directory / ("chat_template.jinja" if name == "default" else f"{DIRECTORY}/{name}.jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(template.encode("utf-8"))
    return tuple(_try(templates, tokens, tokenizer))


def find(source: Path) -> dict[str, str]:
    """Templates by name. Files win over tokenizer_config.json, as in transformers. Raises BadInput."""
    found: dict[str, str] = {}
    path = source / "chat_template.jinja"
    if path.is_file():
        found["default"] = _read(path)
    for path in sorted((source / DIRECTORY).glob("*.jinja")):
        found[path.name.removesuffix(".jinja")] = _read(path)
    for name in () if found else ("tokenizer_config.json", "chat_template.json"):
        found = found or _listed(source / name)
    if len(found) > _MAX_TEMPLATES:
        raise BadInput(f"{source} has more than {_MAX_TEMPLATES} chat templates", "Remove what is not needed.")
    for name, template in found.items():
        _check(source, name, template)
    return found


def _listed(path: Path) -> dict[str, str]:
    """The entry `chat_template` of a file of settings: one template, or several by name."""
    value = _settings(path).get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    entries = value if isinstance(value, list) else [{"name": n, "template": t} for n, t in value.items()] \
        if isinstance(value, dict) else [None]
    found = {}
    for entry in entries:
        name, template = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(template, str):
            raise _unreadable(path, "chat_template is neither a text nor a list of names and templates")
        found[name] = template
    return found


def _check(source: Path, name: str, template: str) -> None:
    if not _NAME.fullmatch(name):
        raise BadInput(f"{source}: a chat template has the name {name[:80]!r}", "Use letters, digits and underscores.")
    try:
        nbytes = len(template.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise _unreadable(source, f"the chat template {name!r} holds half a character ({error.reason})") from error
    if nbytes > MAX_BYTES:
        raise _unreadable(source, f"the chat template {name!r} has more than {MAX_BYTES:,} bytes")


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")  # as open() does
    except UnicodeDecodeError as error:
        raise _unreadable(path, f"is not UTF-8 (byte {error.start})") from error


def _settings(path: Path) -> dict[str, Any]:
    """A JSON file of the tokenizer; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, f"cannot be read ({type(error).__name__}: {str(error)[:100]})") from error
    if not isinstance(settings, dict):
        raise _unreadable(path, "is not a JSON object")
    return settings


def _unreadable(path: Path, what: str) -> BadInput:
    return BadInput(f"{path}: {what}", "Mend or remove the file; without a chat template the model continues texts.")


def _load(source: Path) -> Any:
    """transformers' tokenizer; None where transformers cannot load it."""
    from transformers import AutoTokenizer

    from pocketmoe.export.capture import quiet

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception:  # noqa: BLE001 ; of whatever class a stranger's files provoke
        return None


def special_tokens(source: Path, tokenizer: Any) -> dict[str, str]:
    """What templates know as `bos_token` and so on: transformers' own, else what the files say."""
    if tokenizer is not None:
        return {str(name): str(token) for name, token in tokenizer.special_tokens_map.items()}
    tokens: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for name, token in _settings(source / file).items():
            text = token.get("content") if isinstance(token, dict) else token
            if name in _SPECIAL and isinstance(text, str):
                tokens[name] = text
    return tokens


def _try(templates: Mapping[str, str], tokens: Mapping[str, str], tokenizer: Any) -> Iterator[str]:
    """A note for what cannot work, and for what transformers renders differently."""
    from pocketmoe.chat.template import ChatTemplate

    ours = ChatTemplate(templates, tokens, "the checkpoint")
    if "default" not in templates:
        yield f"there is no default chat template, only {', '.join(sorted(templates))}: use --raw"
        return
    for what, trial in _TRIALS.items():
        try:
            text, reason = ours.render(**trial), ""
        except BadInput as error:
            text, reason = None, str(error).partition("the chat template ")[2]
        theirs = _theirs(tokenizer, trial)
        if text is None and what == "a user's message":
            yield f"the chat template cannot render {what}: use --raw ({reason})"
            return
        if theirs is not None and text != theirs:
            how = f"fails for {what} where transformers does not ({reason})" if text is None else \
                f"renders {what} unlike transformers"
            yield f"the chat template {how}"


def _theirs(tokenizer: Any, trial: Mapping[str, Any]) -> str | None:
    """transformers' rendering; None where it fails. Only for templates that ours has found harmless."""
    if tokenizer is None:
        return None
    given = dict(trial)
    try:
        return tokenizer.apply_chat_template(given.pop("messages"), tokenize=False, add_generation_prompt=True, **given)
    except Exception:  # noqa: BLE001 ; a template can raise whatever Python raises
        return None
