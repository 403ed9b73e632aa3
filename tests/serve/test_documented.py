"""Every example of docs/SERVE.md is run as it stands there: commands, curl, Python."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("openai")
pytest.importorskip("anthropic")

from pocketmoe.cli import main
from pocketmoe.console import serving
from pocketmoe.serve.server import ServeRequest
from tests.hang import HANG_S
from tests.serve.client import Running, running

PAGE = Path(__file__).parents[2] / "docs/SERVE.md"
DOCUMENTED = "http://127.0.0.1:8080"
ELSEWHERE = {"pip", "lm_eval"}  # the installation, and what scripts/clients runs


def examples() -> Iterator[tuple[str, str]]:
    """Blocks of Python, and commands one by one, in the order of the page."""
    for kind, block in re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        if kind == "python":
            yield kind, block
        else:
            assert kind == "sh"
            yield from (("sh", line) for line in re.split(r"\n(?=\w)", block.strip()))


@pytest.fixture
def folder(speaker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page's commands find."""
    for name in ("SMALL", "LARGE"):
        shutil.copytree(speaker, tmp_path / name)
    (tmp_path / "keys.txt").write_text("a-key-of-keys.txt\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked_for(command: str, monkeypatch: pytest.MonkeyPatch) -> ServeRequest:
    """What a `pocketmoe serve` would serve."""
    found: list[ServeRequest] = []
    monkeypatch.setattr(serving, "run", lambda request, *_: found.append(request))
    done = CliRunner().invoke(main, shlex.split(command)[1:], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return found[0]


def test_the_examples_of_the_page_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each `pocketmoe serve` serves what it says; what is asked after it is answered by it."""
    counts = {"serve": 0, "curl": 0, "python": 0}
    server: Running | None = None
    with ExitStack() as stack:
        for kind, text in examples():
            program = kind if kind == "python" else text.split()[0]
            if program in ELSEWHERE:
                continue
            if program == "pocketmoe":
                stack.close()
                server = stack.enter_context(running(asked_for(text, monkeypatch)))
                counts["serve"] += 1
                continue
            assert server, "something is served before it is asked"
            there = text.replace(DOCUMENTED, f"http://127.0.0.1:{server.port}")
            assert there != text
            counts[program] += 1
            if program == "python":
                names: dict[str, Any] = {}
                exec(compile(there, str(PAGE), "exec"), names)
                names["client"].close()  # the page leaves it to the end of the program
                assert capsys.readouterr().out.strip()
            else:
                done = subprocess.run(["bash", "-c", f"{there} --fail"], capture_output=True, text=True, timeout=HANG_S)
                assert (done.returncode, done.stderr) == (0, "")
                assert done.stdout.startswith("{")
    assert counts == {"serve": 3, "curl": 2, "python": 2}
