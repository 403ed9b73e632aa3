"""The tokenizer's part of a bundle: tokenizer.json, and the chat template where there is one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pocketmoe.errors import BadInput
from pocketmoe.export.checkpoint.checkpoint import Checkpoint

DIRECTORY = "tokenizer"
_VOCABULARIES = ("*.model", "vocab.json", "vocab.txt", "*.tiktoken", "tekken.json")  # of slow tokenizers
_AS_IT_IS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def write(checkpoint: Checkpoint, root: Path) -> None:
    """Copy or convert the tokenizer into `root`/tokenizer. Raises BadInput when there is none."""
    directory = root / DIRECTORY
    directory.mkdir()
    if (checkpoint.root / "tokenizer.json").is_file():
        for name in _AS_IT_IS:
            if (checkpoint.root / name).is_file():
                shutil.copyfile(checkpoint.root / name, directory / name)
    else:
        _convert_slow(checkpoint.root, directory, checkpoint.ran_code)
    template = _chat_template(checkpoint.root)
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def _convert_slow(source: Path, directory: Path, run_its_code: bool) -> None:
    if not any(True for pattern in _VOCABULARIES for _ in source.glob(pattern)):
        raise BadInput(f"{source} has no tokenizer.json", "Put a tokenizer.json beside the weights.")
    from transformers import AutoTokenizer

    from pocketmoe.export.capture.capture import quiet

    try:
        with quiet():
            AutoTokenizer.from_pretrained(
                source, local_files_only=True, trust_remote_code=run_its_code
            ).save_pretrained(directory)
    except Exception as error:
        raise BadInput(
            f"{source} has no tokenizer.json, and its tokenizer cannot be converted ({type(error).__name__})",
            "Put a tokenizer.json beside the weights.",
        ) from error
    if not (directory / "tokenizer.json").is_file():
        raise BadInput(f"{source} has no tokenizer.json", "Put a tokenizer.json beside the weights.")


def _chat_template(source: Path) -> str | None:
    path = source / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = _json(source / name).get("chat_template")
        if isinstance(template, list):  # several, by name
            by_name = {entry["name"]: entry["template"] for entry in template}
            template = by_name.get("default")
        if isinstance(template, str):
            return template
    return None


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
