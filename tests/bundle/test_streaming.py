"""A writer that was killed is gone on with: no expert that is whole is made again, and no byte differs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from pocketmoe.bundle.manifest import STORE
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import ExpertId, padded
from pocketmoe.bundle.stream import worker_pool, write_experts
from pocketmoe.bundle.writer import BundleWriter
from pocketmoe.errors import BadInput, OutputError
from tests import bundles

REPOSITORY = Path(__file__).parents[2]
EXPERTS = {ExpertId(layer, expert): 0 for layer in range(bundles.LAYERS) for expert in range(bundles.EXPERTS)}
GOING_ON = "going on where an earlier run was killed"
OVER = "starting over: the source or the options changed since an earlier run was killed"

CHILD = """
import os, signal, sys
from pathlib import Path
from tests.bundle import test_streaming

def kill_at(step):
    if str(step) == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)

test_streaming.write(Path(sys.argv[1]), sys.argv[2], kill_at)
"""


def write(
    target: Path, plan: str | None = "a plan", at: Callable[[str | int], None] = lambda _: None
) -> tuple[Bundle, list[ExpertId], list[str]]:
    """Write a bundle; it, the experts that were made for it, and what was remarked.

    `at` is told each step of the writer, and how many experts are written before each.
    """
    made: list[ExpertId] = []
    said: list[str] = []

    def make(expert: ExpertId) -> tuple[bytes, float]:
        made.append(expert)
        return bundles.record_of(expert), expert.layer + expert.expert / 10

    def progress(what: str, done: int, total: int) -> None:
        if not total:
            said.append(what)
        elif what == "writing":
            at(done)

    with BundleWriter(target, plan, progress, at) as writer, worker_pool(1) as pool:
        manifest = bundles.fill(writer, experts=False)
        written = write_experts(EXPERTS, make, writer.root, pool, progress, "writing")
        writer.hashes[STORE] = written.file_sha256
        assert written.errors == [0.0, 0.1, 1.0, 1.1]
        bundle = writer.publish(msgspec.structs.replace(manifest, store_index_sha256=written.index_sha256), progress)
    return bundle, made, said


def kill(target: Path, step: int | str, plan: str = "a plan") -> Path:
    """A process that writes is killed before its expert of that number, or at that step; what it leaves behind."""
    command = [sys.executable, "-c", CHILD, str(target), plan, str(step)]
    assert subprocess.run(command, cwd=REPOSITORY, check=False).returncode == -9
    (left,) = target.parent.glob(f".{target.name}.*.partial")
    return left


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    """The files of a bundle that nothing interrupted."""
    bundle, made, said = write(tmp_path / "whole")
    assert made == list(EXPERTS)
    assert said == []
    assert list(bundle.verify()) == []
    return bundles.tree(bundle.root)


def finish(target: Path, whole: dict[str, bytes], made_again: int, plan: str = "a plan", said: str = GOING_ON) -> None:
    """The next writer makes the last experts, says what it does, and ends with the same bundle and nothing beside."""
    _, made, remarks = write(target, plan)
    assert made == list(EXPERTS)[len(EXPERTS) - made_again :]
    assert remarks == [said]
    assert bundles.tree(target) == whole
    assert {path.name for path in target.parent.iterdir()} == {"whole", target.name}


@pytest.mark.parametrize(("step", "left"), [(0, 4), (1, 3), (3, 1), ("filled", 0), ("hashed", 0), ("complete", 4)])
def test_a_killed_writer_is_gone_on_with(tmp_path: Path, whole: dict[str, bytes], step: int | str, left: int) -> None:
    """Wherever the kill falls. After the journal is gone, just before the swap, all is made anew."""
    target = tmp_path / "bundle"
    partial = kill(target, step)
    with pytest.raises(BadInput, match="not a PocketMoE bundle"):
        Bundle.open(target)
    if step == "complete":
        assert not (partial / ".resume").exists()
        bundle, made, said = write(target)
        assert (bundles.tree(bundle.root), made, said) == (whole, list(EXPERTS), [])
    else:
        finish(target, whole, left)


def test_it_may_be_killed_again(tmp_path: Path, whole: dict[str, bytes]) -> None:
    kill(tmp_path / "bundle", 1)
    kill(tmp_path / "bundle", 3)
    finish(tmp_path / "bundle", whole, 1)


def spoil_record(partial: Path) -> None:
    with open(partial / STORE, "r+b") as file:
        file.seek(padded(bundles.RECORD_BYTES) + 7)
        file.write(b"\xff\x00")


def spoil_padding(partial: Path) -> None:
    with open(partial / STORE, "r+b") as file:
        file.seek(2 * padded(bundles.RECORD_BYTES) - 1)
        file.write(b"x")


def cut_store(partial: Path) -> None:
    (partial / STORE).write_bytes((partial / STORE).read_bytes()[: padded(bundles.RECORD_BYTES) + 5])


def cut_journal(partial: Path) -> None:
    journal = partial / ".resume/journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0] + lines[1][:20])


@pytest.mark.parametrize("spoil", [spoil_record, spoil_padding, cut_store, cut_journal])
def test_what_is_not_whole_is_made_again(
    tmp_path: Path, whole: dict[str, bytes], spoil: Callable[[Path], None]
) -> None:
    """A power cut may lose pages that the journal already names: bytes are believed by their hash alone."""
    spoil(kill(tmp_path / "bundle", 3))
    finish(tmp_path / "bundle", whole, 3)


def test_another_plan_starts_over_and_says_so(tmp_path: Path, whole: dict[str, bytes]) -> None:
    kill(tmp_path / "bundle", 3)
    finish(tmp_path / "bundle", whole, 4, plan="another", said=OVER)


def test_too_small_a_disk_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first record's size, before it is written."""
    usage = shutil.disk_usage(tmp_path)
    needed = len(EXPERTS) * padded(bundles.RECORD_BYTES)
    monkeypatch.setattr("pocketmoe.bundle.stream.shutil.disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(OutputError, match="the experts need") as caught:
        write(tmp_path / "bundle")
    assert "Free some space" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("pocketmoe.bundle.stream.shutil.disk_usage", lambda _: usage._replace(free=needed))
    write(tmp_path / "bundle")


def test_one_in_use_is_left_alone(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """Two writers of one plan at once: the second does not touch what the first is writing."""
    with BundleWriter(tmp_path / "bundle", "a plan") as first:
        _, made, said = write(tmp_path / "bundle")
        assert (made, said) == (list(EXPERTS), [])
        assert first.root.is_dir()
    assert bundles.tree(tmp_path / "bundle") == whole
