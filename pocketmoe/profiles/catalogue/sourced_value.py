"""Figures of data files that say where they come from, and the reading of such files.

Confidence: V, read in the source named; M, from memory, unverified; C, computed from other figures as the source says.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec

from pocketmoe.bundle.files import read_text
from pocketmoe.errors import BadInput

STALE_AFTER_DAYS = 90

Confidence = Literal["V", "M", "C"]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=400)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[\w.+:/ -]{1,80}$")]  # printable, and safe in a table, a page or YAML
Amount = Annotated[float, msgspec.Meta(ge=0, le=1e18)]
Positive = Annotated[float, msgspec.Meta(ge=1e-9, le=1e18)]  # below, quotients overflow

_Read = TypeVar("_Read")
_MAX_BYTES = 4 << 20
_MAX_LINE = 4096


class SourcedValue(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whatever was looked up somewhere, at some time, with some confidence."""

    source: Text
    as_of: date
    confidence: Confidence


class Figure(SourcedValue, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One number; its unit is in the name of the field that holds it."""

    value: Amount


def read_toml(path: Path, wanted: type[_Read]) -> _Read:
    """A TOML file as typed records. Raises BadInput, which names the file and the field."""
    text = read_text(path, "Name a file that is there, of the form of clouds.toml.", _MAX_BYTES)
    _refuse_long_lines(path, text)
    try:
        return msgspec.convert(tomllib.loads(text), wanted)
    except (ValueError, RecursionError) as error:  # tomllib's own, and an integer of more digits than Python reads
        raise BadInput(f"{path} is not TOML ({error})", "Correct that place.") from error
    except msgspec.ValidationError as error:
        raise BadInput(
            f"{path}: {error}", "Every row needs its fields, and source, as_of (a date) and confidence (V, M or C)."
        ) from error


def _refuse_long_lines(path: Path, text: str) -> None:
    """tomllib takes time by the square of a dotted key's parts: 20 s for a line of 4 MiB. Raises BadInput."""
    for number, line in enumerate(text.split("\n"), 1):
        if len(line) > _MAX_LINE:
            raise BadInput(f"{path}: line {number} has more than {_MAX_LINE} characters", "Break it into shorter ones.")


def stale(records: Iterable[SourcedValue], today: date) -> list[SourcedValue]:
    """Those looked up more than `STALE_AFTER_DAYS` ago."""
    return [record for record in records if (today - record.as_of).days > STALE_AFTER_DAYS]
