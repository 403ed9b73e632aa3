"""What every call of the Hugging Face hub has in common: ids, one line for each way to fail, progress.

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
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self

from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.errors import BadInput, OutputError, PocketMoEError, first_line, install

LIBRARY = "pocketmoe"  # what the hub is told that asks
AGAIN = "Run the same command again: files that are complete are not transferred twice."
_PART = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(rf"{_PART}/{_PART}", re.ASCII)
_REVISION = re.compile(r"[\w.-]+(/[\w.-]+)*", re.ASCII)
_LONGEST = 200  # characters of an id, of which the hub allows 96
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_FULL = (errno.ENOSPC, errno.EDQUOT)

Direction = Literal["download", "upload"]


@dataclass(frozen=True)
class Reference:
    """ORGANIZATION/NAME, and a branch, tag or commit; None: the main branch."""

    repository: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """ORGANIZATION/NAME or ORGANIZATION/NAME@REVISION; None for any other text."""
        name, at, revision = text.partition("@")
        if len(text) > _LONGEST or not is_written_like_an_id(name) or (at and not _REVISION.fullmatch(revision)):
            return None
        return cls(name, revision or None)

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}" if self.revision else self.repository


def is_written_like_an_id(text: str) -> bool:
    """Whether a text has the form ORGANIZATION/NAME."""
    return len(text) <= _LONGEST and _ID.fullmatch(text) is not None


def is_id(name: str) -> bool:
    """Whether this is written like a hub id, and is no path that exists."""
    return not os.path.lexists(name) and is_written_like_an_id(name)


def require_hub(name: str) -> None:
    """Raises BadInput where huggingface_hub is not installed."""
    if not find_spec("huggingface_hub"):
        raise BadInput(
            f"{name} is no directory here, and to ask the hub for it huggingface_hub is needed, which is missing",
            install("hub"),
        )


def check_space(name: str, nbytes: int, place: Path) -> None:
    """Raises OutputError where a download of so many bytes does not fit."""
    there = next(path for path in (place, *place.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if nbytes > free:
        raise OutputError(
            f"{name} needs {nbytes / 1e9:.1f} GB more in {place}, where {free / 1e9:.1f} GB are free",
            "Free some space, or let HF_HOME name a directory on another disk.",
        )


def bar(progress: Progress = no_progress, what: str = "") -> Any:
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
                progress(f"{what} (MB)", int(self._bytes / 1e6), max(1, int(self.total / 1e6)))

    return Bar


@contextlib.contextmanager
def quiet(shows_bars: bool = False) -> Generator[None]:
    """What huggingface_hub has to say comes as an error, or not at all; but for its bars on stderr, where wanted."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before, bars = logging.root.manager.disable, not (shows_bars or are_progress_bars_disabled())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        if bars:
            disable_progress_bars()
        try:
            yield
        finally:
            logging.disable(before)
            if bars:
                enable_progress_bars()


@contextlib.contextmanager
def errors_of(name: str, revision: str | None, direction: Direction = "download") -> Generator[None]:
    """What talking to the hub about a repository raises, as BadInput or OutputError."""
    try:
        yield
    except PocketMoEError:
        raise
    except Exception as error:
        chain = list(_chain(error))
        known = _of_this_machine(chain, name, direction) or _of_the_hub(chain, name, revision, direction)
        raise known from error


def statuses(error: BaseException) -> list[int]:
    """What the hub answered, where it did."""
    from huggingface_hub import errors

    return [e.response.status_code for e in _chain(error) if isinstance(e, errors.HfHubHTTPError)]


def _of_this_machine(chain: list[BaseException], name: str, direction: Direction) -> BadInput | None:
    for error in chain:
        if isinstance(error, OSError) and error.errno in _FULL:
            return OutputError(f"the disk is full while {name} is {direction}ed", f"Free some space. {AGAIN}")
        if isinstance(error, OSError) and error.errno in _READ_ONLY:
            place = error.filename if isinstance(error.filename, str) else "the hub's cache"
            return OutputError(
                f"{place} cannot be written while {name} is {direction}ed ({os.strerror(error.errno or 0)})",
                "Let HF_HOME name a directory that can be, or pull with -o DIRECTORY.",
            )
    return None


def _of_the_hub(chain: list[BaseException], name: str, revision: str | None, direction: Direction) -> BadInput:
    from huggingface_hub import errors

    if _has(chain, errors.GatedRepoError):
        return BadInput(
            f"{name} is gated: the hub gives it to those who accepted its terms",
            f"Accept them at https://huggingface.co/{name}, log in with: hf auth login, and run this again.",
        )
    if _has(chain, errors.RevisionNotFoundError):
        return BadInput(f"{name} has no revision {revision!r}", "Name a branch, tag or commit of its repository.")
    answers = statuses(chain[0])
    if direction == "upload" and (refusal := _of_an_upload(chain, name, answers)):
        return refusal
    if _has(chain, errors.RepositoryNotFoundError):
        return BadInput(
            f"{name} is no directory here, and no model on the hub that you may see",
            "Check the name; for a private or gated model log in with: hf auth login.",
        )
    if answers and answers[0] in (401, 403):
        return BadInput(
            f"the hub refuses {name} ({answers[0]})", "Log in with a token that may read it: hf auth login."
        )
    if _has(chain, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, errors.DryRunError):
        if answers:
            return BadInput(f"the hub answers {answers[0]} when asked for {name}", "Try again later.")
        return BadInput(
            f"{name} is no directory here and not in the hub's cache, and the hub cannot be reached "
            f"({first_line(chain[-1])})",
            "Check the connection (and HF_HUB_OFFLINE), or download the model elsewhere and name its directory.",
        )
    return BadInput(f"the {direction} of {name} broke off ({first_line(chain[-1])})", AGAIN)


def _of_an_upload(chain: list[BaseException], name: str, answers: list[int]) -> BadInput | None:
    from huggingface_hub import errors

    if _has(chain, errors.OfflineModeIsEnabled):
        return BadInput(f"{name} cannot be reached: HF_HUB_OFFLINE is set", "Unset it to push.")
    if _has(chain, errors.LocalTokenNotFoundError) or (answers and answers[0] == 401):
        return BadInput(
            f"the hub wants to know who pushes to {name}", "Log in with a token that may write: hf auth login."
        )
    if answers and answers[0] in (403, 404):
        return BadInput(
            f"the hub does not let you write to {name} ({answers[0]})",
            "Use a name of your own or your organization's, and a token that may write: hf auth login.",
        )
    if answers and answers[0] in (409, 412):
        return BadInput(f"{name} was changed by somebody else meanwhile", "Look at it, and push again.")
    if answers and answers[0] >= 500:
        return BadInput(f"the hub answers {answers[0]} while {name} is uploaded", f"Try again later. {AGAIN}")
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _has(chain: list[BaseException], *kinds: type[BaseException]) -> bool:
    return any(isinstance(error, kinds) for error in chain)
