"""The runtime on systems that lack something: the same tokens, and what is not known is said to be unknown."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.hang import HANG_S
from tests.runnable import write_bundle

REPOSITORY = Path(__file__).parents[2]
SLOTS_STAY = ("direct-reads", "affinity", "c-library", "limits", "fork", "locks", "proc")
MEASURED = {"proc": "resident set", "macos": "resident set", "windows": "not measurable here"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("without") / "bundle").root


def run(lacking: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # By a shell that stays: a process that is started from here inherits our peak of memory, its child does not.
    command = [
        "sh",
        "-c",
        '"$@"; exit $?',
        "sh",
        sys.executable,
        "-m",
        "tests.system.without",
        lacking,
        "--",
        *arguments,
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, env=environment, check=False)


@functools.cache
def report(lacking: str, bundle: Path) -> dict[str, Any]:
    done = run(lacking, "run", str(bundle), "-p", "a b c", "--max-tokens", "12", "--memory", "400MB", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("lacking", [*SLOTS_STAY, "shared-memory", "macos", "windows"])
def test_what_a_system_lacks_changes_no_token(bundle: Path, lacking: str) -> None:
    """The same text, by slots where they can be had; the figures say how memory was measured."""
    expected, found = report("nothing", bundle), report(lacking, bundle)
    assert expected["backend"] == "slots"
    assert expected["memory_measured_by"] == "kernel"
    assert found["tokens"] == expected["tokens"]
    assert found["backend"] == ("slots" if lacking in SLOTS_STAY else "sessions"), found["backend_reason"]
    assert found["memory_measured_by"] == MEASURED.get(lacking, "kernel")
    measurable = found["memory_measured_by"] != "not measurable here"
    assert (found["peak_memory_bytes"] > 10 * 10**6) == measurable
    assert found["memory_budget_bytes"] == 400 * 10**6


def test_what_cannot_be_measured_is_said(bundle: Path) -> None:
    """A line instead of a figure; and without --memory, nobody guesses what is free."""
    done = run("windows", "run", str(bundle), "-p", "a b c", "--max-tokens", "3", "--memory", "400MB")
    assert done.returncode == 0, done.stderr
    assert "memory not measurable here of 400.0 MB" in done.stderr
    done = run("windows", "run", str(bundle), "-p", "a b c", "--max-tokens", "3")
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "--memory" in done.stderr


def test_what_cannot_be_had_costs_a_line(bundle: Path, tmp_path: Path) -> None:
    """Slots by name, packing in place and a prefix cache need what Windows lacks."""
    for arguments in (
        ("run", str(bundle), "-p", "a", "--memory", "400MB", "--backend", "slots"),
        ("pack", "--in-place", str(bundle)),
        ("run", str(bundle), "-p", "a", "--memory", "400MB", "--prefix-cache", str(tmp_path / "cache")),
    ):
        done = run("windows", *arguments)
        assert done.returncode == 3, done.stderr
        assert done.stderr.startswith("Error: ")
        assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="only root can take away /proc")
def test_without_proc_for_everybody(bundle: Path) -> None:
    """An empty file system in the place of /proc: not in Python alone, but for every library."""
    command = f"{sys.executable} -m pocketmoe run {bundle} -p 'a b c' --max-tokens 12 --memory 400MB --json"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs none /proc && {command}; exit $?"],
        capture_output=True, text=True, timeout=HANG_S, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tokens"] == report("nothing", bundle)["tokens"]
    assert (found["backend"], found["memory_measured_by"]) == ("sessions", "resident set")
