"""A quantize that was killed goes on: what a text showed is not measured again, and nothing of it stays afterwards."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pocketmoe.bundle.reader import Bundle
from tests import bundles
from tests.quantize.graphs.test_caches import letters

TinyBundle = Callable[[str], Bundle]
REPOSITORY = Path(__file__).parents[2]

# Kills itself when progress comes to a number of a kind of work; writes each part that it begins to stdout.
CHILD = """
import os, signal, sys
from pocketmoe import cli
from pocketmoe.console.progress import ProgressBar

kill_at, *arguments = sys.argv[1:]
show = ProgressBar.__call__
def said(bar, what, done, total):
    os.write(1, f"{what}: {done}\\n".encode())
    if f"{what}: {done}" == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    show(bar, what, done, total)
ProgressBar.__call__ = said
sys.argv = ["pocketmoe", "quantize", *arguments]
cli.main()
"""
CALIBRATED, MEASURED = "calibrating: 0", "measuring what formats cost"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(letters(0), encoding="utf-8")
    return path


def quantize(
    bundle: Bundle, text: Path, output: Path, kill_at: str = "", budget: tuple[str, str] = ("--size-budget", "20%")
) -> tuple[int, list[str], str]:
    """Exit code, what was done, and what was said."""
    options = ["--scheme", "mixed", *budget, "--rounding", "nearest", "--calibration-tokens", "512"]
    command = [sys.executable, "-c", CHILD, kill_at, str(bundle.root), "-o", str(output), *options]
    done = subprocess.run(
        [*command, "--calibration", str(text)], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.fixture(scope="module")
def whole(tiny_bundle: TinyBundle, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a bundle that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole") / "mixed"
    code, did, said = quantize(tiny_bundle("olmoe"), text, output)
    assert code == 0, said
    assert did.count(CALIBRATED) == 1
    assert [path.name for path in output.parent.iterdir()] == ["mixed"]
    return bundles.tree(output)


@pytest.mark.parametrize(
    ("kill_at", "layers_left"),
    [
        ("how much each layer matters: 4", 4),  # calibrated, and nothing kept yet
        (f"{MEASURED}: 11", 3),
        ("measuring dense tensors: 0", 0),
        ("quantizing experts: 4", 0),  # the experts of the first plan
        ("quantizing experts: 29", 0),
    ],
)
def test_what_was_measured_before_a_kill_is_not_measured_again(
    tiny_bundle: TinyBundle,
    text: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    kill_at: str,
    layers_left: int,
) -> None:
    bundle, output = tiny_bundle("olmoe"), tmp_path / "mixed"
    code, did, _ = quantize(bundle, text, output, kill_at)
    assert code == -9
    assert did.count(CALIBRATED) == 1
    (left,) = tmp_path.glob(".mixed-measuring.*.partial")
    code, did, said = quantize(bundle, text, output)
    assert code == 0, said
    assert "oing on where an earlier run was killed" in said
    assert did.count(CALIBRATED) == (layers_left == 4)
    experts = [layer.n_experts for layer in bundle.manifest.moe_layers]
    begun = [f"{MEASURED}: {number}" for number in range(sum(experts))]
    assert [line for line in did if line in begun] == begun[sum(experts[: len(experts) - layers_left]) :]
    assert bundles.tree(output) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["mixed"], left


def test_another_text_starts_over(tiny_bundle: TinyBundle, text: Path, tmp_path: Path) -> None:
    bundle, output = tiny_bundle("olmoe"), tmp_path / "mixed"
    assert quantize(bundle, text, output, "measuring dense tensors: 0")[0] == -9
    other = tmp_path / "other.txt"
    other.write_text(letters(1), encoding="utf-8")
    code, did, said = quantize(bundle, other, output)
    assert code == 0, said
    assert "tarting over" in said
    assert did.count(CALIBRATED) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixed", "other.txt"]


def test_an_output_that_must_not_be_replaced_is_refused_before_measuring(
    tiny_bundle: TinyBundle, text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "mixed"
    output.mkdir()
    (output / "of somebody else").touch()
    code, did, said = quantize(tiny_bundle("olmoe"), text, output)
    assert (code, did) == (3, [])
    assert "exists and is not" in said
    assert [path.name for path in tmp_path.iterdir()] == ["mixed"]


def test_a_command_that_fails_leaves_nothing_of_the_text(tiny_bundle: TinyBundle, text: Path, tmp_path: Path) -> None:
    """Only a kill leaves anything, for the next command to the same output to go on with, or to remove."""
    bundle, output = tiny_bundle("olmoe"), tmp_path / "mixed"
    assert quantize(bundle, text, output, "measuring dense tensors: 0")[0] == -9
    left = list(tmp_path.iterdir())
    code, did, said = quantize(bundle, text, output, budget=("--size-budget", "1%"))
    assert (code, did) == (4, [])  # seen at once: what the kill has left stays for a command that can be
    assert "cannot be met" in said
    assert list(tmp_path.iterdir()) == left
    code, did, said = quantize(bundle, text, output, budget=("--fetch-budget", "1kB"))
    assert code == 4
    assert CALIBRATED in did
    assert "cannot be met" in said
    assert list(tmp_path.iterdir()) == []
