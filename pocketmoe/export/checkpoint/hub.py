"""Checkpoints on the Hugging Face hub: the files an export needs, downloaded into the hub's cache, at one commit.

huggingface_hub does the work, and reads its own settings: HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE. What it
raises becomes one of our errors here, and nowhere else.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, cast

from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.errors import BadInput, OutputError, PocketMoEError, first_line

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt", "README.md"]
_NOT = ["*/*", "consolidated*"]  # other forms of the same weights
_AGAIN = "Run the same command again: files that are complete are not downloaded twice."


def find(name: str, *, revision: str | None = None, code: bool = False, progress: Progress = no_progress) -> Path:
    """The directory of a checkpoint: `name` itself where it exists, else the snapshot of the hub model of that id.

    `revision`: a branch, tag or commit of the hub's repository; by default its main branch. The directory's own name
    is the commit. `code`: download its Python files too. Raises BadInput, OutputError.
    """
    if os.path.lexists(name):
        if revision is not None:
            raise BadInput(f"{name} is a local path, which has no revisions", "Leave out --revision, or name a hub id.")
        return Path(name)
    if not _ID.fullmatch(name):
        raise BadInput(
            f"{name} is neither a directory that exists nor a hub id",
            "Name a directory with config.json and *.safetensors, or a model of the hub as ORGANIZATION/NAME.",
        )
    patterns = [*_FILES, "*.py"] if code else _FILES
    with _errors_of(name, revision), _quiet():
        return _download(name, revision, patterns, progress)


def is_id(name: str) -> bool:
    """Whether this is written like a hub id, and is no path that exists."""
    return not os.path.lexists(name) and _ID.fullmatch(name) is not None


def find_config(name: str) -> Path:
    """The config.json of a hub model, alone, in the hub's cache. Raises BadInput, OutputError."""
    from huggingface_hub import hf_hub_download  # pyright: ignore[reportUnknownVariableType]

    with _errors_of(name, None), _quiet():
        return Path(hf_hub_download(name, "config.json", library_name="pocketmoe"))


def _download(name: str, revision: str | None, patterns: list[str], progress: Progress) -> Path:
    import huggingface_hub
    from huggingface_hub import constants, errors

    snapshot_download = cast("Callable[..., Any]", huggingface_hub.snapshot_download)  # `dry_run` decides what it gives

    options: dict[str, Any] = {"allow_patterns": patterns, "ignore_patterns": _NOT, "library_name": "pocketmoe"}
    if constants.HF_HUB_OFFLINE:
        return Path(snapshot_download(name, revision=revision, local_files_only=True, **options))
    try:
        plan = snapshot_download(name, revision=revision, dry_run=True, tqdm_class=_bar(no_progress), **options)
    except errors.DryRunError as error:
        if _statuses(error):
            raise
        return Path(snapshot_download(name, revision=revision, local_files_only=True, **options))  # no network: cached?
    names = {file.filename for file in plan}
    if not any(file.endswith(".safetensors") for file in names):
        raise BadInput(
            f"{name} has no weights as safetensors; pickles can run code and are not read",
            "Choose a model with *.safetensors, or convert it (transformers: save_pretrained) and name its directory.",
        )
    missing = [file for file in plan if file.will_download]
    _check_space(name, sum(file.file_size or 0 for file in missing), Path(constants.HF_HUB_CACHE))
    if missing:
        progress(f"downloading {name}", 0, len(missing))
    # at the commit that was looked at: the branch may move on meanwhile
    return Path(snapshot_download(name, revision=plan[0].commit_hash, tqdm_class=_bar(progress, name), **options))


def _check_space(name: str, nbytes: int, cache: Path) -> None:
    place = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if nbytes > free:
        raise OutputError(
            f"{name} needs {nbytes / 1e9:.1f} GB more in {cache}, where {free / 1e9:.1f} GB are free",
            "Free some space, or let HF_HOME name a directory on another disk.",
        )


def _bar(progress: Progress, name: str = "") -> Any:
    """What huggingface_hub takes for a progress bar; the one that counts bytes reports them in megabytes."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            self._reports = options.get("unit") == "B" and "Reconstruct" in str(options.get("desc"))
            self._bytes = 0.0
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self._bytes += n or 0
            if self._reports and self.total:
                progress(f"downloading {name} (MB)", int(self._bytes / 1e6), max(1, int(self.total / 1e6)))

    return Bar


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """What huggingface_hub has to say comes as an error, or not at all."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


@contextlib.contextmanager
def _errors_of(name: str, revision: str | None) -> Generator[None]:
    try:
        yield
    except PocketMoEError:
        raise
    except Exception as error:
        raise _translate(error, name, revision) from error


def _translate(error: Exception, name: str, revision: str | None) -> BadInput:
    from huggingface_hub import errors

    chain = list(_chain(error))
    if any(isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT) for e in chain):
        return OutputError(f"the disk is full while {name} is downloaded", f"Free some space. {_AGAIN}")
    if _has(chain, errors.GatedRepoError):
        return BadInput(
            f"{name} is gated: the hub gives it to those who accepted its terms",
            f"Accept them at https://huggingface.co/{name}, log in with: hf auth login, and run this again.",
        )
    if _has(chain, errors.RevisionNotFoundError):
        return BadInput(f"{name} has no revision {revision!r}", "Name a branch, tag or commit of its repository.")
    if _has(chain, errors.RepositoryNotFoundError):
        return BadInput(
            f"{name} is no directory here, and no model on the hub that you may see",
            "Check the name; for a private or gated model log in with: hf auth login.",
        )
    statuses = [e.response.status_code for e in chain if isinstance(e, errors.HfHubHTTPError)]
    if statuses and statuses[0] in (401, 403):
        return BadInput(
            f"the hub refuses {name} ({statuses[0]})", "Log in with a token that may read it: hf auth login."
        )
    if _has(chain, errors.OfflineModeIsEnabled) or _has(chain, errors.LocalEntryNotFoundError, errors.DryRunError):
        if statuses:
            return BadInput(f"the hub answers {statuses[0]} when asked for {name}", "Try again later.")
        return BadInput(
            f"{name} is not in the hub's cache, and the hub cannot be reached ({first_line(chain[-1])})",
            "Check the connection (and HF_HUB_OFFLINE), or download the model elsewhere and name its directory.",
        )
    return BadInput(f"the download of {name} broke off ({first_line(chain[-1])})", _AGAIN)


def _statuses(error: BaseException) -> list[int]:
    """What the hub answered, where it did."""
    from huggingface_hub import errors

    return [e.response.status_code for e in _chain(error) if isinstance(e, errors.HfHubHTTPError)]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _has(chain: list[BaseException], *kinds: type[BaseException]) -> bool:
    return any(isinstance(error, kinds) for error in chain)
