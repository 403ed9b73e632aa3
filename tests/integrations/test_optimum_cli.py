"""optimum-cli finds the package's subcommands, which do what the package's own commands do."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from pocketmoe.bundle.reader import Bundle
from tests.hang import HANG_S

REPOSITORY = Path(__file__).parents[2]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of optimum-cli with these arguments, in this process."""
    from optimum.commands.optimum_cli import main

    sys.modules.pop("optimum.commands.register.register_pocketmoe", None)  # as in a new process
    monkeypatch.setattr(sys, "argv", ["optimum-cli", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        main()
    return int(done.value.code or 0)


def test_help_lists_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With the options of the commands that they run."""
    assert call(monkeypatch, "--help") == 0
    assert "Work on PocketMoE's bundles." in capsys.readouterr().out
    for arguments, words in (
        (("export", "pocketmoe"), ("--scheme", "--adapter", "--trust-remote-code", "OUTPUT", "--model")),
        (("pocketmoe", "quantize"), ("--scheme", "--calibration", "--kv", "BUNDLE")),
        (("pocketmoe", "push"), ("--private", "--revision", "ORG/NAME")),
        (("pocketmoe", "pull"), ("--output", "ORG/NAME[@REVISION]")),
    ):
        assert call(monkeypatch, *arguments, "--help") == 0
        shown = capsys.readouterr().out
        assert all(word in shown for word in words)


def test_they_run(
    tiny_bundle: Callable[[str], Bundle],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is written is the command's own, bit for bit; so are errors, their codes, and values that begin with -."""
    source, target = tiny_bundle("olmoe").root, tmp_path / "small"
    options = ("--scheme", "int8", "--format", "attention=int4-b32", "--format", "head=int8-b32")
    assert call(monkeypatch, "pocketmoe", "quantize", source, "-o", target, *options) == 0
    assert "Wrote" in capsys.readouterr().err
    kinds = {tensor.role: tensor.scheme for tensor in Bundle.open(target).manifest.dense}
    assert kinds["attention"].startswith("int4")
    assert Bundle.open(target).manifest.expert_kinds[0].scheme.startswith("int8")
    assert call(monkeypatch, "export", "pocketmoe", "-m", tmp_path / "none", tmp_path / "out", "--scheme", "int4") == 3
    assert "neither a directory" in capsys.readouterr().err
    assert call(monkeypatch, "pocketmoe", "quantize", source, "-o", target, "--calibration-tokens=-5") == 2
    assert not (tmp_path / "out").exists()


def test_a_wheel_brings_what_optimum_looks_for() -> None:
    """The file lies where optimum-cli looks, in a folder without __init__.py, and the wheel has that folder."""
    wheel = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert "optimum" in wheel["packages"]
    files = [path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "optimum").rglob("*.py")]
    assert files == ["optimum/commands/register/register_pocketmoe.py"]


def test_the_package_does_without_optimum() -> None:
    """Nothing but the integration imports it, or what it stands on."""
    code = """
import sys
for name in ("optimum", "transformers", "torch", "requests"):
    sys.modules[name] = None
import pocketmoe, pocketmoe.cli, pocketmoe.api, pocketmoe.runtime.model, pocketmoe.hub.pull
assert not [name for name in sys.modules if name.startswith("pocketmoe.integrations")]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, timeout=HANG_S)
