"""The transcripts of docs/OPTIMUM.md and docs/HUB.md are what is said: each command runs, numbers may differ."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from pocketmoe.hub.client import Reference
from pocketmoe.hub.push import push
from tests.hub.server import Repository, WritableHub

DOCS, HOME = Path(__file__).parents[2] / "docs", "/home/you"
_PROGRESS = re.compile(r"^$|\.\.\.$|: \d+ s$|%\|")  # what is under way, ours and transformers'


class Step(NamedTuple):
    """A command of a transcript, and the lines that it is to say."""

    command: list[str]
    said: list[str]


def transcript(page: str) -> Iterator[Step]:
    """The indented lines of a page that begin with $, each with what follows it."""
    for block in re.findall(r"(?:^    .*\n)+", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE):
        if block.startswith("    $ "):
            for part in block.split("    $ ")[1:]:
                command, *said = part.splitlines()
                yield Step(shlex.split(command), [line.removeprefix("    ") for line in said])


def masked(lines: list[str]) -> list[str]:
    """Without what differs from one machine, model and version to the next: numbers, hashes, addresses, homes."""
    found: list[str] = []
    for line in lines:
        line = re.sub(r"https?://[^/\s]+", "HUB", line)
        line = re.sub(r"\S*/models--", "CACHE/models--", line)
        line = re.sub(r"\b[0-9a-f]{7,64}\b", "HASH", line)
        line = re.sub(r"\d[\d,.]*( [kMG]?B\b)?", "N", line)
        found.append(line.rstrip())
    return found


def called(program: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a program of the package, or of optimum-cli, in this process."""
    from optimum.commands.optimum_cli import main as optimum_cli

    from pocketmoe.cli import main as pocketmoe

    sys.modules.pop("optimum.commands.register.register_pocketmoe", None)  # as in a new process
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as done:
        {"optimum-cli": optimum_cli, "pocketmoe": pocketmoe}[program]()
    return int(done.value.code or 0)


@pytest.mark.parametrize(("page", "least"), [("OPTIMUM.md", 4), ("HUB.md", 5)])
def test_the_transcripts(
    page: str,
    least: int,
    root: Path,
    tiny_checkpoint: Callable[[str], Path],
    hub: WritableHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In their order, of a tiny model in the reference model's place, and a hub where `me` is logged in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/reference").mkdir(parents=True)
    (tmp_path / "models/reference/checkpoint").symlink_to(tiny_checkpoint("olmoe"))
    if page == "HUB.md":
        (tmp_path / "olmoe-int4").symlink_to(root)
        someone = hub.repositories["someone/olmoe-int4"] = Repository()
        someone.commit({})
        push(root, Reference("someone/olmoe-int4"))
        someone.branches["v1"] = someone.branches["main"]
    steps = [*transcript(page)]
    assert len(steps) >= least
    for (program, *arguments), wanted in steps:
        code = called(program, arguments, monkeypatch)
        out, err = capsys.readouterr()
        said = [*err.replace(str(tmp_path), HOME).splitlines(), *out.replace(str(tmp_path), HOME).splitlines()]
        assert masked([line for line in said if not _PROGRESS.search(line)]) == masked(wanted), said
        assert code == (3 if wanted[0].startswith("Error: ") else 0)
