"""Whether this machine has loaded a bundle's tokenizer in a child before, kept as a line beside the packed experts.

Loading a vocabulary of 150,000 words takes 0.34 s, in a child as in the run itself: so the child's is once per bundle
and version of tokenizers. Like all of `packed/` the line is this machine's own, and a wrong one costs a clean error.
"""

from __future__ import annotations

import contextlib
import os

import tokenizers

from pocketmoe.bundle.packed import REHEARSED, is_packed_folder
from pocketmoe.bundle.reader import Bundle
from pocketmoe.runtime.backends.packing import packed_folder
from pocketmoe.system.files import CLOEXEC, NO_LINK, NO_WAITING

_FLAGS = NO_LINK | NO_WAITING | CLOEXEC  # no link, and no pipe that nobody writes to


def was_rehearsed(bundle: Bundle, tokenizer: str) -> bool:
    """Whether the bundle's file of that name, with these bytes, has been loaded before."""
    with contextlib.suppress(OSError):
        file = os.open(packed_folder(bundle) / REHEARSED, os.O_RDONLY | _FLAGS)
        try:
            return os.read(file, 200) == _line(bundle, tokenizer)
        finally:
            os.close(file)
    return False


def note_rehearsal(bundle: Bundle, tokenizer: str) -> None:
    """Write down that it has, where experts have been packed; a directory that cannot be written is none of it."""
    folder = packed_folder(bundle)
    if not is_packed_folder(folder):
        return
    with contextlib.suppress(OSError):
        file = os.open(folder / REHEARSED, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _FLAGS, 0o600)
        try:
            os.write(file, _line(bundle, tokenizer))
        finally:
            os.close(file)


def _line(bundle: Bundle, tokenizer: str) -> bytes:
    return f"{bundle.manifest.files[tokenizer].sha256} {tokenizers.__version__}\n".encode()
