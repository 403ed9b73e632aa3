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

# Kills itself when the function or method at a dotted place is called for the n-th time; says when it calibrates, and
# when it measures an expert.
CHILD = """
import importlib, os, signal, sys
from pocketmoe import cli, pipeline
from pocketmoe.quantize.mixed import sensitivity

place, count, *arguments = sys.argv[1:]
if place:
    module, _, name = place.partition(":")
    owner = importlib.import_module(module)
    *path, name = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    real, calls = getattr(owner, name), []
    def killed(*args, **named):
        calls.append(1)
        if len(calls) == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **named)
    setattr(owner, name, killed)
def said(word, of):
    def call(*args, **named):
        os.write(1, word)
        return of(*args, **named)
    return call
pipeline.calibrate = said(b"calibrated ", pipeline.calibrate)
sensitivity._measure_one = said(b"measured ", sensitivity._measure_one)
sys.argv = ["pocketmoe", "quantize", *arguments]
cli.main()
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(letters(0), encoding="utf-8")
    return path


def quantize(
    bundle: Bundle, text: Path, output: Path, place: str = "", count: int = 0, budget: str = "20%"
) -> tuple[int, list[str], str]:
    """Exit code, what was done, and what was said."""
    options = ["--scheme", "mixed", "--size-budget", budget, "--rounding", "nearest", "--calibration-tokens", "512"]
    command = [sys.executable, "-c", CHILD, place, str(count), str(bundle.root), "-o", str(output), *options]
    done = subprocess.run(
        [*command, "--calibration", str(text)], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    return done.returncode, done.stdout.split(), done.stderr


@pytest.fixture(scope="module")
def whole(tiny_bundle: TinyBundle, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a bundle that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole") / "mixed"
    code, did, said = quantize(tiny_bundle("olmoe"), text, output)
    assert code == 0, said
    assert did.count("calibrated") == 1
    assert [path.name for path in output.parent.iterdir()] == ["mixed"]
    return bundles.tree(output)


@pytest.mark.parametrize(
    ("place", "count", "layers_left"),
    [
        ("pocketmoe.calibration:_save", 1, 4),  # calibrated, and nothing kept yet
        ("pocketmoe.quantize.mixed.sensitivity:smoothed_share", 12, 3),
        ("pocketmoe.quantize.mixed.choose:measure_dense", 1, 0),
        ("pocketmoe.bundle.stream:_JournaledWriter.write", 5, 0),  # the experts of the first plan
        ("pocketmoe.bundle.stream:_JournaledWriter.write", 30, 0),
    ],
)
def test_what_was_measured_before_a_kill_is_not_measured_again(
    tiny_bundle: TinyBundle,
    text: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    place: str,
    count: int,
    layers_left: int,
) -> None:
    bundle, output = tiny_bundle("olmoe"), tmp_path / "mixed"
    code, did, _ = quantize(bundle, text, output, place, count)
    assert code == -9
    assert did.count("calibrated") == 1
    (left,) = tmp_path.glob(".mixed-measuring.*.partial")
    code, did, said = quantize(bundle, text, output)
    assert code == 0, said
    assert "oing on where an earlier run was killed" in said
    assert did.count("calibrated") == (place == "pocketmoe.calibration:_save")
    assert did.count("measured") == layers_left * bundle.manifest.moe_layers[0].n_experts
    assert bundles.tree(output) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["mixed"], left


def test_another_text_starts_over(tiny_bundle: TinyBundle, text: Path, tmp_path: Path) -> None:
    bundle, output = tiny_bundle("olmoe"), tmp_path / "mixed"
    assert quantize(bundle, text, output, "pocketmoe.quantize.mixed.choose:measure_dense", 1)[0] == -9
    other = tmp_path / "other.txt"
    other.write_text(letters(1), encoding="utf-8")
    code, did, said = quantize(bundle, other, output)
    assert code == 0, said
    assert "tarting over" in said
    assert did.count("calibrated") == 1
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
    assert quantize(bundle, text, output, "pocketmoe.quantize.mixed.choose:measure_dense", 1)[0] == -9
    code, did, said = quantize(bundle, text, output, budget="1%")
    assert code == 4
    assert "calibrated" in did
    assert "cannot be met" in said
    assert list(tmp_path.iterdir()) == []
