"""What a size means that somebody wrote (800MB, 1.5GiB, 4G, or 40% of something), and how sizes are written."""

from __future__ import annotations

import re

_UNITS = (
    {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    | {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    | {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}  # as docker and systemd mean them
)
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B|[KMGT])?\s*", re.IGNORECASE | re.ASCII)
_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*", re.ASCII)
_LEAST_PLAIN = 10**6  # bytes; of a smaller number somebody forgot the unit
_MOST = 1 << 60
_MOST_CHARACTERS = 64


def parse_size(text: str) -> int:
    """Bytes for `800MB`, `1.5GiB`, `4G` (as docker and systemd mean it: GiB) or a plain number of at least a million.

    Raises ValueError, also for nothing and for less than a byte.
    """
    match = _SIZE.fullmatch(text) if len(text) <= _MOST_CHARACTERS else None
    if not match:
        raise ValueError(f"{_shown(text)} is not a size: write 800MB, 1.5GiB or 4G")
    number, unit = match[1], (match[2] or "").upper()
    nbytes = float(number) * _UNITS[unit]
    if not unit and nbytes < _LEAST_PLAIN:
        asked = f": did you mean {number}GB" + (f", or {float(number) * 100:g}%?" if 0 < nbytes < 1 else "?")
        raise ValueError(f"{_shown(text)} has no unit" + (asked if nbytes else ", and nothing is not enough"))
    if nbytes < 1:
        raise ValueError(f"{_shown(text)} is not a size: it is less than a byte")
    if nbytes > _MOST:
        raise ValueError(f"{_shown(text)} is more than any machine has")
    return int(nbytes)


def parse_share(text: str) -> float | None:
    """0.4 for `40%`, None for what is no share. Raises ValueError beyond 100%."""
    match = _SHARE.fullmatch(text) if len(text) <= _MOST_CHARACTERS else None
    if match and float(match[1]) > 100:
        raise ValueError(f"{_shown(text)} is more than all")
    return float(match[1]) / 100 if match else None


def in_words(nbytes: float) -> str:
    """`12.3 MB`."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


def peak_in_words(nbytes: int) -> str:
    """The most memory that was in use, where it could be measured."""
    return in_words(nbytes) if nbytes else "not measurable here"


def range_words(low: float, high: float) -> str:
    """`8 to 14`, `0.8 to 1.4`: two digits each, and one number where they are the same."""
    words = [_two_digits(value) for value in (low, high)]
    return words[0] if words[0] == words[1] else " to ".join(words)


def _two_digits(value: float) -> str:
    shown = float(f"{value:.2g}")
    return f"{shown:.0f}" if shown >= 10 else f"{shown:.2g}"


def _shown(text: str) -> str:
    return repr(text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}...")
