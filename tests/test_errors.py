"""Errors: each has its exit code, one line, and one thing to do."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from pocketmoe import errors
from pocketmoe.errors import BudgetTooSmall, DamagedFile, PocketMoEError, install

ALL = [item for item in vars(errors).values() if inspect.isclass(item) and issubclass(item, PocketMoEError)]


def test_the_exit_codes_are_those_of_the_drawn_tree() -> None:
    """The tree at the top of errors.py names every class, with its depth and exit code."""
    drawn = re.findall(r"^    ( *)(\w+) +(\d) ", errors.__doc__ or "", re.MULTILINE)
    depth = {error.__name__: 2 * (len(error.__mro__) - len(PocketMoEError.__mro__)) for error in ALL}
    assert {name: (len(indent), int(code)) for indent, name, code in drawn} == {
        error.__name__: (depth[error.__name__], error.exit_code) for error in ALL
    }


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PocketMoEError("it broke"), "it broke."),
        (PocketMoEError("it broke.", "Mend it."), "it broke. Mend it."),
        (PocketMoEError("it\nbroke\n\n twice", "Mend\n  it."), "it broke twice. Mend it."),
        (PocketMoEError("a name \x1b[2J\x07\u202e"), "a name ?[2J??."),
        (DamagedFile("b/x.bin", "is cut short"), "b/x.bin: is cut short. Export or copy the bundle again."),
    ],
)
def test_an_error_is_one_printable_line(error: PocketMoEError, line: str) -> None:
    """Message and remedy are one line that cannot steer a terminal, whatever a hostile file put into it."""
    assert error.one_line() == line


def test_an_error_is_short_and_keeps_its_remedy() -> None:
    """A name of a megabyte in a hostile file does not flood the terminal, nor push the remedy away."""
    line = DamagedFile("b/manifest.json", f"lists no file {'x' * 10**6!r}").one_line()
    assert len(line) < 2000
    assert line.startswith("b/manifest.json: lists no file 'xxx")
    assert line.endswith("x (and so on). Export or copy the bundle again.")


def test_the_budget_that_an_error_names_would_do() -> None:
    """The least budget is rounded up, so that the command it suggests is accepted."""
    error = BudgetTooSmall(budget_bytes=100 * 10**6, least_bytes=123_000_001)
    assert "--memory 124MB" in error.one_line()
    assert error.least_bytes >= 123_000_001


CLONE = "pip install '.[export]', in a clone of the project."


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        (None, ["pocketmoe[export]"]),
        ({"url": "file://{here}", "dir_info": {}}, ["{here}[export]"]),
        ({"url": "file://{here}", "dir_info": {"editable": True}}, ["-e", "{here}[export]"]),
        ({"url": "file://{here}/it%27s.whl", "archive_info": {}}, ["{here}/it's.whl[export]"]),
        ({"url": "https://a.b/p-1.whl", "archive_info": {}}, ["pocketmoe[export] @ https://a.b/p-1.whl"]),
        (
            {"url": "https://a.b/p.git", "vcs_info": {"vcs": "git", "commit_id": "0"}},
            ["pocketmoe[export] @ git+https://a.b/p.git"],
        ),
        ({"url": "file://{here}/gone.whl", "archive_info": {}}, None),
        ({"url": 3}, None),
        ([], None),
        ({}, None),
    ],
)
def test_what_to_install_comes_from_where_this_came_from(
    origin: Any, words: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index, a folder, a wheel or an address, as the installer has noted it; else the line for a clone."""
    info = tmp_path / "pocketmoe-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pocketmoe\nVersion: 0\n")
    (tmp_path / "it's.whl").touch()
    if origin is not None:
        (info / "direct_url.json").write_text(json.dumps(origin).replace("{here}", str(tmp_path)))
    monkeypatch.syspath_prepend(str(tmp_path))
    line = install("export").removeprefix("Install what it needs: ")
    if words is None:
        assert line == CLONE
    else:
        assert shlex.split(line.removesuffix("."))[2:] == [word.replace("{here}", str(tmp_path)) for word in words]
        assert line.startswith("pip install ")
