"""What a size means that somebody wrote (800MB, 1.5GiB, or 40% of something), and how sizes are written."""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)?\s*", re.IGNORECASE)
_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


def parse_size(text: str) -> int:
    """Bytes for `800MB`, `1.5GiB` or a plain number. Raises ValueError."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is not a size: write 800MB or 1.5GiB")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


def parse_share(text: str) -> float | None:
    """0.4 for `40%`, None for anything else."""
    match = _SHARE.fullmatch(text)
    return float(match[1]) / 100 if match else None


def in_words(nbytes: float) -> str:
    """`12.3 MB`."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"
