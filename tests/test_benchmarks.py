"""Benchmarks: each says what it takes, without what only its run needs, and stands in their README."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if "ArgumentParser(" in path.read_text("utf-8"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_says_what_it_takes(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--help` ends with exit code 0, also where peers such as llama.cpp are not installed."""
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.syspath_prepend(str(FOLDER))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert not ended.value.code
    assert capsys.readouterr().out.startswith(f"usage: {script.name}")


def test_the_readme_names_every_benchmark() -> None:
    """In its table, or among what they are made of."""
    text = (FOLDER / "README.md").read_text("utf-8")
    assert [path.name for path in FOLDER.glob("*.py") if f"`{path.name}`" not in text] == []
