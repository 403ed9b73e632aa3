"""The chat templates of a checkpoint: found as transformers finds them, tried, and written into a bundle."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pocketmoe.chat_template.template import MAX_TEMPLATE_BYTES, MAX_TEMPLATES, ChatTemplate
from pocketmoe.errors import BadInput, printable
from pocketmoe.jsonfile import is_array, is_object, parse_object

DIRECTORY = "additional_chat_templates"
_WITHOUT = "Mend or remove the file; without a chat template the model continues texts."
_MAX_FILE_BYTES = 64 << 20  # tokenizer_config.json lists all added tokens
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_LEAST = "a user's message"
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
    _LEAST: {"messages": [_USER]},
    "a system message": {"messages": [{"role": "system", "content": "Be short."}, _USER]},
    "several turns": {"messages": [_USER, {"role": "assistant", "content": "Hi"}, _USER]},
    "tools": {"messages": [_USER], "tools": [_TOOL]},
}


def write(source: Path, directory: Path) -> None:
    """Write the chat templates of `source` into `directory`. Raises BadInput for one that is no text."""
    for name, template in find(source).items():
        path = directory / ("chat_template.jinja" if name == "default" else f"{DIRECTORY}/{name}.jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(template.encode("utf-8"))


def remarks(source: Path, directory: Path) -> Iterator[str]:
    """What a user should know of the templates in `directory`, which has its special_tokens_map.json: what fails.

    A template that fails is no reason to refuse a checkpoint: `run --raw` works without.
    """
    templates = find(source)
    if not templates:
        return
    if "default" not in templates:
        yield f"there is no default chat template, only {', '.join(sorted(templates))}: use --raw"
        return
    tokens = _settings(directory / "special_tokens_map.json")
    chat = ChatTemplate(templates, tokens, str(source))
    for what, trial in _TRIALS.items():
        try:
            chat.render(**trial)
        except BadInput as error:
            reason = printable(str(error).removeprefix(f"{source}: "))
            yield f"{what} cannot be rendered: {reason}" + ("; use --raw" if what == _LEAST else "")
            if what == _LEAST:
                return


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
    if len(found) > MAX_TEMPLATES:
        raise BadInput(f"{source} has more than {MAX_TEMPLATES} chat templates", "Remove what is not needed.")
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
    if is_object(value):
        value = [{"name": name, "template": template} for name, template in value.items()]
    found: dict[str, str] = {}
    for entry in value if is_array(value) else [None]:
        name, template = (entry.get("name"), entry.get("template")) if is_object(entry) else (None, None)
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
    if nbytes > MAX_TEMPLATE_BYTES:
        raise _unreadable(source, f"the chat template {name!r} has more than {MAX_TEMPLATE_BYTES:,} bytes")


def _read(path: Path) -> str:
    try:
        return _bytes(path).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")  # as open() does
    except UnicodeDecodeError as error:
        raise _unreadable(path, f"is not UTF-8 (byte {error.start})") from error


def _bytes(path: Path) -> bytes:
    """What a file holds. A link may lead within the checkpoint, or to the hub cache's own files."""
    root = Path(os.path.realpath(path.parent if path.parent.name != DIRECTORY else path.parent.parent))
    target = Path(os.path.realpath(path))
    in_cache = root.parent.name == "snapshots" and target.is_relative_to(root.parent.parent / "blobs")
    if not target.is_relative_to(root) and not in_cache:
        raise BadInput(f"{path} is a link to outside of the checkpoint", "Put the file itself there.")
    try:
        with target.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) > _MAX_FILE_BYTES:
        raise _unreadable(path, f"has more than {_MAX_FILE_BYTES:,} bytes")
    return data


def _settings(path: Path) -> dict[str, Any]:
    """A JSON file of the tokenizer; empty where there is none."""
    if not path.is_file():
        return {}
    return parse_object(_bytes(path), path, _WITHOUT)


def _unreadable(path: Path, what: str) -> BadInput:
    return BadInput(f"{path}: {what}", _WITHOUT)
