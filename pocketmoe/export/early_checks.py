"""What can be refused at once, before torch is imported: an export of minutes shall not end with it.

All of it is checked again where it is used; here only what names, headers and config.json say.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pocketmoe.bundle.store import translate_write_errors
from pocketmoe.bundle.writer import refuse_to_replace
from pocketmoe.errors import BadInput, UnsupportedModel
from pocketmoe.export.checkpoint import config, hub
from pocketmoe.export.tensors.adapter import refuse_adapter
from pocketmoe.export.tensors.directory import Directory
from pocketmoe.export.tensors.shards import Shards
from pocketmoe.export.text.tokenizer import check_vocabulary
from pocketmoe.jsonfile import is_object

_EXPERTS = ("expert", "moe", "router")
_LLAMA_CPP = "Name a mixture of experts; llama.cpp, or ONNX Runtime by itself, runs a dense model."


def check_target(target: Path) -> None:
    """Raises OutputError for a place where no bundle can be put."""
    target = target.absolute()
    refuse_to_replace(target)
    beside = next(folder for folder in target.parents if folder.is_dir())
    with translate_write_errors(target), tempfile.TemporaryDirectory(prefix=".pocketmoe-", dir=beside):
        pass  # it can be written, which permissions alone do not tell


def check_source(root: Path, run_its_code: bool = False, has_adapter: bool = False) -> None:
    """A checkpoint's directory. Raises BadInput, DamagedFile or UnsupportedModel."""
    directory = Directory(root)
    directory.check(("*.py",) if run_its_code else ())
    refuse_adapter(directory, is_chosen=has_adapter)
    settings = config.read_settings(root)
    shards = Shards(directory, settings.get("transformers_weights"), headers_only=True)
    shapes = {key: shards.shape(key) for key in shards.keys}
    if is_dense(settings, shapes):
        raise UnsupportedModel(f"{root} is a dense model: it has no experts to page", _LLAMA_CPP)
    config.check_sizes(root / config.FILE, settings, shapes)
    check_vocabulary(root, sorted(path.name for path in root.iterdir()))


def check_hub(name: str, revision: str | None) -> None:
    """Of a hub id, before the download, which says what else there is. Raises UnsupportedModel."""
    try:
        path = hub.description(name, revision)
        settings = config.read_file(path) if path else {}
    except BadInput:
        return
    if is_dense(settings, {}):
        raise UnsupportedModel(f"{name} is a dense model: it has no experts to page", _LLAMA_CPP)


def is_dense(settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether neither a setting nor a tensor's name speaks of experts, nor has a weight one axis more for them."""
    nested = [value for value in settings.values() if is_object(value)]
    names = (str(name) for part in (settings, *nested) for name in part)
    words = (str(settings.get("model_type")), *names, *shapes)
    return "hidden_size" in settings and not _speaks_of_experts(words) and all(len(s) < 3 for s in shapes.values())


def _speaks_of_experts(words: Iterable[str]) -> bool:
    return any(mark in word.lower() for word in words for mark in _EXPERTS)
