"""Checkpoints on the Hugging Face hub: the files an export needs, downloaded into the hub's cache, at one commit."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.errors import BadInput
from pocketmoe.hub.client import (
    LIBRARY,
    Reference,
    bar,
    check_space,
    errors_of,
    is_id,
    is_written_like_an_id,
    quiet,
    statuses,
)
from pocketmoe.hub.pull import find_description

_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt", "README.md"]
_NOT = ["*/*", "consolidated*"]  # other forms of the same weights


def find(name: str, *, revision: str | None = None, code: bool = False, progress: Progress = no_progress) -> Path:
    """The directory of a checkpoint: `name` itself where it exists, else the snapshot of the hub model of that id.

    `revision`: a branch, tag or commit of the hub's repository; by default its main branch. The directory's own name
    is the commit. `code`: download its Python files too. Raises BadInput, OutputError.
    """
    if os.path.lexists(name):
        if revision is not None:
            raise BadInput(f"{name} is a local path, which has no revisions", "Leave out --revision, or name a hub id.")
        return Path(name)
    if not is_written_like_an_id(name):
        raise BadInput(
            f"{name} is neither a directory that exists nor a hub id",
            "Name a directory with config.json and *.safetensors, or a model of the hub as ORGANIZATION/NAME.",
        )
    patterns = [*_FILES, "*.py"] if code else _FILES
    with errors_of(name, revision), quiet():
        return _download(name, revision, patterns, progress)


def description(name: str, revision: str | None = None) -> Path | None:
    """The config.json (or a bundle's manifest.json) of a hub id, alone, in the hub's cache; None for a local path.

    Raises BadInput, OutputError.
    """
    return find_description(Reference(name, revision)) if is_id(name) else None


def _download(name: str, revision: str | None, patterns: list[str], progress: Progress) -> Path:
    import huggingface_hub
    from huggingface_hub import constants, errors

    snapshot_download = cast("Callable[..., Any]", huggingface_hub.snapshot_download)  # `dry_run` decides what it gives

    options: dict[str, Any] = {"allow_patterns": patterns, "ignore_patterns": _NOT, "library_name": LIBRARY}
    if constants.HF_HUB_OFFLINE:
        return Path(snapshot_download(name, revision=revision, local_files_only=True, **options))
    try:
        plan = snapshot_download(name, revision=revision, dry_run=True, tqdm_class=bar(), **options)
    except errors.DryRunError as error:
        if statuses(error):
            raise
        return Path(snapshot_download(name, revision=revision, local_files_only=True, **options))  # no network: cached?
    names = {file.filename for file in plan}
    if not any(file.endswith(".safetensors") for file in names):
        raise BadInput(
            f"{name} has no weights as safetensors; pickles can run code and are not read",
            "Choose a model with *.safetensors, or convert it (transformers: save_pretrained) and name its directory.",
        )
    missing = [file for file in plan if file.will_download]
    check_space(name, sum(file.file_size or 0 for file in missing), Path(constants.HF_HUB_CACHE))
    if missing:
        progress(f"downloading {name}", 0, len(missing))
    # at the commit that was looked at: the branch may move on meanwhile
    return Path(
        snapshot_download(
            name, revision=plan[0].commit_hash, tqdm_class=bar(progress, f"downloading {name}"), **options
        )
    )
