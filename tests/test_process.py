"""The process around a command: signals, pipes that close, disks that are full, terminals in other encodings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import pocketmoe.cli
from pocketmoe.errors import BadInput, BudgetTooSmall

POCKETMOE = f"{sys.executable} -m pocketmoe"


def shell(line: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        capture_output=True,
        text=True,
        errors="replace",
        env=os.environ | env,
        check=False,
    )


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("--help | true", 0, ""),
        ("plan --help | head -c 1 >/dev/null", 0, ""),
        ("--help > /dev/full", 3, "stdout cannot be written (No space left on device)"),
        ("--version >&-", 3, "stdout is closed"),
        ("--version > /dev/null 2>&-", 0, ""),
        ("--version > /dev/null <&-", 0, ""),
        ("inspect /nowhere 2>&-", 3, ""),
        ("inspect /nowhere 2> /dev/full", 3, ""),
        ("frobnicate 2> /dev/full", 2, ""),
        ("inspect $'/no\\xffwhere\\x1b[31m'", 3, "is not a PocketMoE bundle"),
    ],
)
def test_streams_that_fail_cost_a_line_and_a_code(line: str, code: int, words: str) -> None:
    """A reader that goes is no error; a result that cannot be written is; a message that cannot is dropped."""
    done = shell(f"{POCKETMOE} {line}")
    assert (done.returncode, len(done.stderr.splitlines())) == (code, 1 if words else 0), done.stderr
    assert words in done.stderr
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("as_json", [True, False])
def test_a_terminal_of_another_encoding_gets_what_it_can_show(encoding: str, as_json: bool) -> None:
    """Names beyond the encoding are escaped in text; JSON stays JSON, and whole."""
    code = f"""
from pocketmoe import cli
import click
@cli.main.command()
def say():
    import dataclasses
    from pocketmoe.console.options import print_json
    if {as_json}:
        print_json(dataclasses.make_dataclass("R", ["name"])("é─\\U0001f600\\udcff"))
    else:
        click.echo("é─\\U0001f600\\udcff")
cli.main(["say"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding}, check=False
    )
    assert done.returncode == 0, done.stderr
    if as_json:
        assert json.loads(done.stdout.decode(encoding)) == {"name": "é─\U0001f600\udcff"}
    else:
        assert done.stdout.strip()


@pytest.mark.parametrize(("number", "code", "word"), [("SIGINT", 130, "Interrupted."), ("SIGTERM", 143, "Terminated.")])
@pytest.mark.parametrize("moment", ["importing", "working"])
def test_a_signal_ends_the_process_in_order(tmp_path: Path, number: str, code: int, word: str, moment: str) -> None:
    """While modules are imported and while a command works: one word, the usual code, nothing left behind."""
    made = tmp_path / "made"
    sending = f"import os, signal, time; os.kill(os.getpid(), signal.{number}); time.sleep(60)"
    if moment == "importing":
        (tmp_path / "click.py").write_text(sending)
        command = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from pocketmoe.__main__ import main; main()"
    else:
        command = f"""
import click, pathlib
from pocketmoe import cli
@cli.main.command()
def work():
    made = pathlib.Path({str(made)!r})
    made.touch()
    try:
        {sending}
    finally:
        made.unlink()
cli.main(["work"])
"""
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert done.stderr.split() == [word]
    assert not made.exists()


def test_signals_that_are_ignored_stay_ignored() -> None:
    """Under nohup, and as a shell's background job, a command goes on."""
    code = "import os, signal; from pocketmoe import process; process.unwind_on_signals(); os.kill(os.getpid(), 1)"
    done = subprocess.run(["nohup", sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


RAISED = [
    (BadInput("no", "do"), 3, "no. do"),
    (BudgetTooSmall(1, 2), 4, "cannot be met"),
    (OSError(28, "No space left on device", "/x"), 3, "/x: cannot be written"),
    (OSError(5, "Input/output error"), 3, "Input/output error"),
    (FileNotFoundError(2, "No such file or directory", "/proc/self/status"), 3, "Mount /proc"),
    (MemoryError(), 4, "not enough memory"),
    (RecursionError("deep"), 3, "nested too deeply"),
    (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"), 3, "encoding"),
    (type("PanicException", (BaseException,), {})("a panic"), 3, "a library gave up"),
    (KeyboardInterrupt(), 130, "Interrupted."),
    (TypeError("two\nlines \x1b[31m"), 1, "this is a bug: TypeError in test_process.py:"),
]


@pytest.mark.parametrize(("error", "code", "words"), RAISED, ids=lambda value: type(value).__name__)
def test_whatever_a_command_raises_becomes_a_line_and_a_code(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str
) -> None:
    """No exception of any kind is a traceback, unless it is asked for."""

    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(pocketmoe.cli.main.commands["doctor"], "callback", fail)
    found = CliRunner().invoke(pocketmoe.cli.main, ["doctor"])
    assert found.exit_code == code
    assert words in found.stderr
    assert "Traceback" not in found.stderr
    assert "\x1b" not in found.stderr
    assert len(found.stderr.split("\n")) <= 3
    shown = CliRunner().invoke(pocketmoe.cli.main, ["doctor"], env={"POCKETMOE_TRACEBACK": "1"})
    assert shown.exit_code == code
    assert ("Traceback" in shown.stderr) == (code != 130)
