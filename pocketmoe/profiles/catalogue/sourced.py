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

from pocketmoe.errors import BadInput

STALE_AFTER_DAYS = 90

Confidence = Literal["V", "M", "C"]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=400)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[\w.+:/ -]{1,80}$")]  # printable, and safe in a table, a page or YAML
Amount = Annotated[float, msgspec.Meta(ge=0, le=1e18)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e18)]

_Read = TypeVar("_Read")
_MAX_BYTES = 4 << 20


class Sourced(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whatever was looked up somewhere, at some time, with some confidence."""

    source: Text
    as_of: date
    confidence: Confidence


class Figure(Sourced, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One number; its unit is in the name of the field that holds it."""

    value: Amount


def read_toml(path: Path, wanted: type[_Read]) -> _Read:
    """A TOML file as typed records. Raises BadInput, which names the file and the field."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise BadInput(f"{path} has more than {_MAX_BYTES} bytes", "Give a file of prices.")
        return msgspec.convert(tomllib.loads(data.decode()), wanted)
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror})", "Name a file that is there.") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadInput(f"{path} is not TOML ({error})", "Correct that place.") from error
    except msgspec.ValidationError as error:
        raise BadInput(
            f"{path}: {error}", "Every row needs its fields, and source, as_of (a date) and confidence (V, M or C)."
        ) from error


def stale(records: Iterable[Sourced], today: date) -> list[Sourced]:
    """Those looked up more than `STALE_AFTER_DAYS` ago."""
    return [record for record in records if (today - record.as_of).days > STALE_AFTER_DAYS]
