"""What generation_config.json says: where texts end, and how their authors sample.

As in transformers' `generate`: where the file is there, config.json's ends of text do not count, even if the file names
none; a file that is no JSON counts as absent.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from pocketmoe.bundle.manifest import Sampling
from pocketmoe.errors import BadInput
from pocketmoe.jsonfile import NotJson, is_array, read_object

FILE = "generation_config.json"
_MAX_BYTES = 4 << 20
_REMEDY = f"Mend or remove {FILE}."


class Generation(NamedTuple):
    """Ends of text, and the authors' sampling; `notes` say what a user might not expect."""

    eos_token_ids: tuple[int, ...]
    sampling: Sampling | None
    notes: tuple[str, ...]


def read(root: Path, config_eos: Any) -> Generation:
    """What holds for the checkpoint at `root`, whose config.json has `config_eos` as its ends of text.

    Raises BadInput for a file whose contents transformers cannot use either.
    """
    path = root / FILE
    settings, note = _settings(path)
    if settings is None:
        return Generation(_token_ids(root / "config.json", config_eos), None, note)
    ends = _token_ids(path, settings.get("eos_token_id"))
    if not ends and config_eos is not None:
        note = (f"{FILE} names no end of text, so that answers end at --max-tokens, as with transformers",)
    sampling, odd = _sampling(settings)
    if odd:
        note = (*note, f"{FILE} has values that make no sense, which are left out: {', '.join(odd)}")
    return Generation(ends, sampling, note)


def _settings(path: Path) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """The file's contents; None, and perhaps a note, where there is none that can be read."""
    if not path.is_file():
        return None, ()
    try:
        return read_object(path, most_bytes=_MAX_BYTES, remedy=_REMEDY), ()
    except NotJson:
        return None, (f"{FILE} is no JSON, so that config.json says where texts end, as with transformers",)


def _token_ids(path: Path, value: Any) -> tuple[int, ...]:
    """Ids of tokens: one, several, or none; negative ones never come up. Raises BadInput for anything else."""
    ids = value if is_array(value) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise BadInput(f"{path}: eos_token_id is {json.dumps(value)[:80]}", "Give one token id, or a list of them.")
    return tuple(dict.fromkeys(token for token in ids if 0 <= token < 1 << 31))


def _sampling(settings: dict[str, Any]) -> tuple[Sampling | None, list[str]]:
    """The authors' sampling, None where they say nothing; and the names whose values cannot be."""
    kept: dict[str, Any] = {}
    odd: list[str] = []
    for field in msgspec.structs.fields(Sampling):
        value = settings.get(field.name)
        if value is None:
            continue
        try:
            kept[field.name] = msgspec.convert(value, field.type, strict=True)
        except msgspec.ValidationError:
            odd.append(field.name)
    return (Sampling(**kept) if kept else None), odd
