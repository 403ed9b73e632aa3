"""Functions of the C library that Python has no word for, by name, where this system's library has them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def c_function(name: str) -> Callable[..., int] | None:
    """A function that returns an int and sets errno (`ctypes.get_errno`); None where there is none of that name."""
    found: Any = getattr(library(), name, None)
    return found


@cache
def library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None, use_errno=True)
    except (OSError, TypeError):  # TypeError: Windows has no library of that kind
        return None
