"""Faults planted for the harness to find: `test_harness` runs them as children."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path


def refuse(line: str, code: int) -> int:
    sys.stderr.write(line)
    return code


def fail() -> None:
    raise IndexError("planted")


def spin() -> None:
    while True:
        pass


def grow() -> None:
    kept = []
    while True:
        kept.append(b"x" * (1 << 20))
        time.sleep(0.001)


def grow_in_a_child() -> int:
    return subprocess.call([sys.executable, "-c", "from tests.fuzz.planted import grow; grow()"])


def leave_running() -> None:
    subprocess.Popen(["sleep", "60"])


def delete() -> None:
    shutil.rmtree("../canary/Documents")


def write_home() -> None:
    (Path.home() / "deviceid").write_text("x")


def change_input() -> None:
    Path("in.txt").write_text("y")


def copy_secret() -> None:
    Path("out").mkdir()
    shutil.copyfile("../canary/.ssh/id", "out/MODEL_CARD.md")
