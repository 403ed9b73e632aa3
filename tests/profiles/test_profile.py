"""profile.json: what is written is read again, and what is not a profile is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pocketmoe.errors import BadInput, DamagedFile, PocketMoEError
from pocketmoe.profiles.profile import PROFILE, read_profile, write_profile
from tests.profiles import made_up


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    """Every field survives, from the file and from its directory; nothing else is left behind."""
    profile = made_up.profile()
    write_profile(tmp_path / PROFILE, profile)
    write_profile(tmp_path / PROFILE, profile)
    assert read_profile(tmp_path / PROFILE) == read_profile(tmp_path) == profile
    assert [path.name for path in tmp_path.iterdir()] == [PROFILE]


def put(value: Any, *keys: Any) -> Any:
    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (put(2, "format"), "has format 2"),
        (put(1, "surprise"), "surprise"),
        (put("\x1b[2Jgone", "model", "name"), "control characters"),
        (put("a\nb", "runs", 0, "memory"), "control characters"),
        (put(-1, "runs", 0, "bytes_read"), "cannot be read"),
        (put(0, "runs", 0, "step_median_s"), "cannot be read"),
        (put("guessed", "runs", 0, "energy", "label"), "cannot be read"),
        (put([8], "model", "experts"), "of every layer"),
        (put([[1] * 8], "routing", "uses"), "other experts"),
        (put([], "routing", "curve"), "another text"),
        (put([9999], "routing", "curve", 0, "visits_by_misses"), "another text"),
        (put([], "runs"), "no run"),
    ],
)
def test_what_is_no_profile_is_refused(tmp_path: Path, change: Any, why: str) -> None:
    """Another format, a surprise, control characters, impossible numbers, and parts that do not fit each other."""
    write_profile(tmp_path / PROFILE, made_up.profile())
    data = json.loads((tmp_path / PROFILE).read_text())
    change(data)
    (tmp_path / PROFILE).write_text(json.dumps(data))
    with pytest.raises(DamagedFile, match=why):
        read_profile(tmp_path)


@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"format": 1}', '{"format": 1, "runs": NaN}', "\xff"])
def test_what_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / PROFILE).write_text(text, encoding="latin-1")
    with pytest.raises(DamagedFile):
        read_profile(tmp_path)


def test_a_missing_profile_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as refused:
        read_profile(tmp_path / "nowhere" / PROFILE)
    assert isinstance(refused.value, PocketMoEError)
    assert "pocketmoe profile" in refused.value.one_line()
