"""What the system lets a process take: `ulimit`'s figures, where there are such."""

from __future__ import annotations

import contextlib
from typing import Literal, NamedTuple

try:
    import resource
except ImportError:  # Windows
    resource = None

Limited = Literal["NOFILE", "MEMLOCK", "DATA", "STACK", "AS", "CPU", "CORE"]


class Limit(NamedTuple):
    """The one that holds now, and what it may be raised to; None for no limit."""

    soft: int | None
    hard: int | None


def limit_of(what: Limited) -> Limit:
    """As it is now; without limit where the system knows none of that kind."""
    number = _number(what)
    if resource is None or number is None:
        return Limit(None, None)
    soft, hard = resource.getrlimit(number)
    return Limit(*(None if value == resource.RLIM_INFINITY else value for value in (soft, hard)))


def set_limit(what: Limited, soft: int | None) -> bool:
    """Set the one that holds, at most to the one that it may be raised to; False where the system does not let us."""
    number = _number(what)
    if resource is None or number is None:
        return False
    _, hard = resource.getrlimit(number)
    wanted = resource.RLIM_INFINITY if soft is None else soft
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(number, (wanted, hard))
        return True
    return False


def lower_limit(what: Limited, value: int) -> None:
    """Set both to a value that is not above what is set already, for good, where the system can."""
    number = _number(what)
    if resource is not None and number is not None:
        _, hard = resource.getrlimit(number)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))


def _number(what: Limited) -> int | None:
    return getattr(resource, f"RLIMIT_{what}", None)
