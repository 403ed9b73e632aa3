"""Runs the command line as on a system that lacks something: `python -m tests.system.without macos -- run BUNDLE ...`.

What is lacking is taken away before anything of pocketmoe is imported. The libraries that it stands on, which have
their own ways on each system, are imported before.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

for _name in ("click", "jinja2", "msgspec", "numpy", "onnxruntime", "psutil", "tokenizers"):
    importlib.import_module(_name)

_OPENING = ("open", "os.listdir", "os.scandir", "os.mkdir")


def no_such_place(*places: str) -> None:
    """Opening, listing or making anything below these fails, whoever tries it in Python."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _OPENING and not isinstance(arguments[0], int | None):
            path = os.fsdecode(arguments[0])
            if path.startswith(places):
                raise FileNotFoundError(2, "No such file or directory", path)

    sys.addaudithook(hook)


def no_module(*names: str) -> None:
    for name in names:
        sys.modules[name] = None  # type: ignore[assignment]


def no_names(module: Any, *names: str) -> None:
    for name in names:
        if hasattr(module, name):
            delattr(module, name)


def no_c_library() -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise TypeError("a library has no name")  # what Windows says to CDLL(None)

    ctypes.CDLL = refuse  # type: ignore[assignment, misc]


def as_on_macos() -> None:
    no_such_place("/proc", "/sys", "/dev/shm")
    no_names(os, "O_DIRECT", "posix_fadvise", "posix_fallocate", "fdatasync", "sched_getaffinity", "sched_setaffinity")
    no_c_library()


def as_on_windows() -> None:
    as_on_macos()
    no_module("fcntl", "resource")
    flags = ("O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY")
    calls = ("fork", "preadv", "pread", "pwrite", "geteuid", "getuid", "fchmod", "uname", "sysconf")
    no_names(os, *flags, *calls)
    no_names(signal, "SIGHUP")


LACKS: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "proc": lambda: no_such_place("/proc"),
    "shared-memory": lambda: no_such_place("/dev/shm"),
    "direct-reads": lambda: no_names(os, "O_DIRECT"),
    "affinity": lambda: no_names(os, "sched_getaffinity", "sched_setaffinity"),
    "c-library": no_c_library,
    "locks": lambda: no_module("fcntl"),
    "limits": lambda: no_module("resource"),
    "fork": lambda: no_names(os, "fork"),
    "macos": as_on_macos,
    "windows": as_on_windows,
}

if __name__ == "__main__":
    lacking, _, *arguments = sys.argv[1:]
    LACKS[lacking]()
    sys.argv = ["pocketmoe", *arguments]
    from pocketmoe.__main__ import main

    main()
