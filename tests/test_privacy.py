"""Nothing leaves the machine, and nothing is written but where the user said: commands in an empty home, traced."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import pocketmoe
from pocketmoe.bundle.reader import Bundle

STRACE = shutil.which("strace")
INTERNET = re.compile(r"AF_INET6?\b|AF_PACKET")


def run_alone(home: Path, *args: str | Path) -> str:
    """Run a command whose home and temporary directory are new, without our settings; its calls to the network."""
    trace = home.with_name("trace")
    (home / "tmp").mkdir(parents=True)
    ours = {*pocketmoe.TELEMETRY_OFF, "XDG_CACHE_HOME", "HF_HOME"}
    env = {name: value for name, value in os.environ.items() if name not in ours}
    env |= {"HOME": str(home), "TMPDIR": str(home / "tmp")}
    traced = [STRACE, "-f", "-qq", "--seccomp-bpf", "-e", "trace=network", "-o", trace] if STRACE else []
    command = [*traced, sys.executable, "-m", "pocketmoe", *args]
    done = subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return trace.read_text() if STRACE else ""


def commands(bundle: Path, checkpoint: Path, text: Path, out: Path) -> dict[str, tuple[str | Path, ...]]:
    return {
        "run": ("run", bundle, "--raw", "--prompt", "hello", "--max-tokens", "2", "--memory", "50%"),
        "eval": ("eval", bundle, "--text", text),
        "profile": ("profile", bundle, "-o", out, "--memory", "50%", "--prompt-tokens", "4", "--output-tokens", "3"),
        "quantize": ("quantize", bundle, "-o", out, "--scheme", "int8"),
        "plan": ("plan", bundle, "--device", "this"),
        "export": ("export", checkpoint, "-o", out),
    }


@pytest.mark.parametrize(
    "name", ["run", "eval", "profile", "quantize", "plan", pytest.param("export", marks=pytest.mark.slow)]
)
def test_a_command_tells_nobody_and_leaves_nothing_in_the_home(
    tiny_bundle: Callable[[str], Bundle], tiny_checkpoint: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """No socket to any network is opened, and home and temporary directory are as empty afterwards as before."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4, encoding="utf-8")
    home = tmp_path / "home"
    bundle = shutil.copytree(tiny_bundle("olmoe").root, tmp_path / "bundle")
    calls = run_alone(home, *commands(bundle, tiny_checkpoint("olmoe"), text, tmp_path / "out")[name])
    found = sorted(str(path.relative_to(home)) for path in home.rglob("*"))
    inductor = [path for path in found if path.startswith("tmp/torchinductor_")]  # torch makes it, empty
    assert found == ["tmp", *inductor]
    assert len(inductor) <= (name == "export")
    assert not INTERNET.search(calls), calls


def test_what_was_set_stays_set() -> None:
    """A variable that somebody set keeps its value; the others are off for this process and those that it starts."""
    code = "import pocketmoe.quantize.workers, os, sys; print([os.environ.get(n) for n in sys.argv[1:]])"
    names = list(pocketmoe.TELEMETRY_OFF)
    env = {name: value for name, value in os.environ.items() if name not in names}
    asked = [sys.executable, "-c", code, *names]
    done = subprocess.run(asked, env=env | {"RAY_USAGE_STATS_ENABLED": "1"}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(
        ["1" if name.startswith("RAY") else pocketmoe.TELEMETRY_OFF[name] for name in names]
    )
