"""What a size means that somebody wrote (800MB, 1.5GiB, 4G, or 40% of something), and how sizes are written."""

from __future__ import annotations

import re

_UNITS = (
    {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    | {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    | {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}  # as Kubernetes means them
    | {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}  # as docker and systemd mean them
)
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([KMGT]?I?B|[KMGT]I?)?\s*", re.IGNORECASE | re.ASCII)
_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*", re.ASCII)
_LEAST_PLAIN = 10**6  # bytes; of a smaller number somebody forgot the unit
_MOST = 1 << 60
_MOST_CHARACTERS = 64


def parse_size(text: str, or_share: bool = False) -> int:
    """Bytes for `800MB`, `1.5GiB`, `4G` (as docker and systemd mean it: GiB) or a plain number of at least a million.

    `or_share`: where 40% would be taken too. Raises ValueError, also for nothing and for less than a byte.
    """
    match = _SIZE.fullmatch(text) if len(text) <= _MOST_CHARACTERS else None
    if not match:
        raise ValueError(f"{_shown(text)} is not a size: write 800MB, 1.5GiB or 4G")
    number, unit = match[1], (match[2] or "").upper()
    nbytes = float(number) * _UNITS[unit]
    if not unit and nbytes < _LEAST_PLAIN:
        asked = f": did you mean {number}GB" + (_or_share(float(number) if or_share else 0))
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


def _or_share(number: float) -> str:
    """What else a number without a unit may have meant: 0.4 and 40 a share."""
    share = 100 * number if number < 1 else number
    return f", or {share:g}%?" if 0 < number < 1 or 5 <= number <= 100 else "?"


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
