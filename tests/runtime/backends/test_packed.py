"""A bundle comes from anywhere, and so does its packed/: nothing outside it is read, written or removed through it."""

# pyright: reportAssignmentType=false

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from pocketmoe.bundle.packed import EXPERT_COUNTS, PACKED, PACKING
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.writer import BundleWriter
from pocketmoe.cli import main
from pocketmoe.errors import DamagedFile, OutputError
from pocketmoe.runtime.backends import packing
from pocketmoe.runtime.backends.slots import SlotsUnavailable, open_slots
from pocketmoe.runtime.paging.expert_counts import ExpertCounts
from tests import bundles, runnable
from tests.bundles import write_runnable

PLENTY = 1 << 40
OTHER_KEY = "0123456789abcdef"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """What is not ours: files under every name that packing uses, in folders and beside them."""
    home = tmp_path / "home"
    names = ("packing.json", "experts.bin", "uses.f64", "kind_0.onnx", "kind_0.seed", ".resume/plan", ".resume/journal")
    for folder in (".", "Documents", OTHER_KEY, f".{OTHER_KEY}.abcdefgh.partial"):
        for name in (*names, "thesis.txt"):
            path = home / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{folder} {name}")
    return home


def everything(root: Path) -> dict[str, tuple[int, bytes]]:
    """Every entry below `root`, with its kind and mode and what it holds."""
    found: dict[str, tuple[int, bytes]] = {}
    for path in sorted(root.rglob("*")):
        info = path.lstat()
        content = bytes(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found[path.relative_to(root).as_posix()] = (info.st_mode, content)
    return found


def packed_bundle(tmp_path: Path) -> Bundle:
    bundle = write_runnable(tmp_path / "bundle")
    use(bundle)
    return bundle


def use(bundle: Bundle) -> None:
    """What run, eval and profile do with a bundle's packed/: open or pack it, compute, leave counts."""
    with bundle.open_store() as store:
        open_slots(bundle, store, PLENTY).close()
    ExpertCounts(packing.packed_folder(bundle), [2, 2]).read()
    ExpertCounts(packing.packed_folder(bundle), [2, 2]).add(np.ones((2, 2), np.int64), 1)


def usable(bundle: Bundle) -> bool:
    packed = packing.open_packed(bundle)
    if packed:
        packed.close()
    return packed is not None


def link(target: Path) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def placements(root: Path, key: str, home: Path) -> dict[str, tuple[Path, Callable[[Path], None]]]:
    """Each thing that is put where packing expects something else: where, and how it is made."""
    folder = root / PACKED / key
    partial = root / PACKED / f".{key}.abcdefgh.partial"
    folders = {"packed": root / PACKED, "key": folder, "old key": root / PACKED / OTHER_KEY, "partial": partial}
    files = {name: folder / name for name in (PACKING, "experts.bin", "kind_0.onnx", "kind_0.seed", EXPERT_COUNTS)}
    things: dict[str, Callable[[Path], None]] = {
        "link": link(home),
        "link to a folder of that kind": link(home / OTHER_KEY),
        "link to a file": link(home / "thesis.txt"),
        "link to its parent": link(Path("..")),
        "dangling link": link(home / "nothing"),
        "fifo": os.mkfifo,
        "file": lambda path: path.write_bytes(b"mine") and None,
        "folder": lambda path: shutil.copytree(home / "Documents", path) and None,
    }
    placed = [(place, path, what) for place, path in folders.items() for what in things]
    placed += [(place, path, what) for place, path in files.items() for what in ("link to a file", "fifo", "folder")]
    return {f"{place}: {what}": (path, things[what]) for place, path, what in placed}


NAMES = sorted(placements(Path(), "k", Path()))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_outside_is_touched_whatever_lies_in_packed(tmp_path: Path, home: Path, name: str) -> None:
    """The bundle is refused, or slots are with a reason, or the experts are packed; the outside stays as it was."""
    bundle = packed_bundle(tmp_path)
    path, make = placements(bundle.root, packing.device_key(bundle), home)[name]
    if os.path.lexists(path):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(path)
    before = everything(home)
    refusal = _use_and_replace(bundle.root, str(path))
    if path.name == PACKED and not name.endswith(": folder"):
        assert "packed: is not a directory of this bundle" in refusal
    elif refusal:
        assert str(path) in refusal
    assert everything(home) == before


def _use_and_replace(root: Path, path: str) -> str:
    """Verify and use a bundle, and publish another in its place; why not, or "" where it could be used."""
    refusal = ""
    try:
        bundle = Bundle.open(root)
        odd = [line for line in bundle.verify() if path in line]
        assert odd or Path(path).is_dir() or Path(path).is_file()
        use(bundle)
    except (DamagedFile, SlotsUnavailable) as error:
        refusal = str(error)
    with contextlib.suppress(OutputError), BundleWriter(root) as writer:
        writer.publish(bundles.fill(writer))
    return refusal


@pytest.mark.parametrize("command", ["run", "eval", "profile", "quantize", "verify"])
def test_every_command_refuses_a_packed_that_leads_elsewhere(tmp_path: Path, home: Path, command: str) -> None:
    """With one line and exit 3."""
    bundle = write_runnable(tmp_path / "bundle")
    (bundle.root / PACKED).symlink_to(home)
    before = everything(home)
    (tmp_path / "text.txt").write_text("hello")
    arguments = {
        "run": ["--prompt", "x"],
        "eval": ["--text", str(tmp_path / "text.txt")],
        "profile": ["-o", str(tmp_path / "out")],
        "quantize": ["-o", str(tmp_path / "out"), "--scheme", "int8"],
        "verify": [],
    }
    result = CliRunner().invoke(main, [command, str(bundle.root), *arguments[command]])
    assert result.exit_code == 3, result.output
    assert "packed: is not a directory of this bundle" in result.output
    assert everything(home) == before


def test_what_other_machines_packed_goes_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    """An old folder is removed by the names of its files; one that holds more, and other folders, stay."""
    bundle = write_runnable(tmp_path / "bundle")
    packed = bundle.root / PACKED
    for folder in (OTHER_KEY, "fedcba9876543210", "notes"):
        (packed / folder).mkdir(parents=True)
        (packed / folder / "kind_0.seed").write_bytes(b"x")
    (packed / "fedcba9876543210/thesis.txt").write_text("mine")
    use(bundle)
    assert {path.name for path in packed.iterdir()} == {packing.device_key(bundle), "fedcba9876543210", "notes"}
    assert [path.name for path in (packed / "fedcba9876543210").iterdir()] == ["thesis.txt"]
    assert (packed / "notes/kind_0.seed").exists()
    with pytest.raises(OutputError, match="it holds packed/"):
        BundleWriter(bundle.root)


def test_what_was_packed_elsewhere_is_not_used(tmp_path: Path) -> None:
    """A copy of a folder that this very machine packed, as an archive would bring it, is packed again."""
    bundle = packed_bundle(tmp_path)
    assert usable(bundle)
    shutil.copytree(bundle.root, tmp_path / "copy")  # modes and times are kept
    copy = Bundle.open(tmp_path / "copy")
    assert not usable(copy)
    use(copy)
    assert usable(copy)


def test_what_another_run_has_packed_meanwhile_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs that begin to pack at once: the second to end takes the first one's, and leaves it in its place."""
    bundle = write_runnable(tmp_path / "bundle")
    pack_into, inodes = packing.pack_into, []

    def slowly(*arguments: Any) -> packing.Packing:
        monkeypatch.setattr(packing, "pack_into", pack_into)
        use(bundle)
        inodes.append(packing.packed_folder(bundle).stat().st_ino)
        return pack_into(*arguments)

    monkeypatch.setattr(packing, "pack_into", slowly)
    use(bundle)
    assert inodes == [packing.packed_folder(bundle).stat().st_ino]
    assert [path.name for path in (bundle.root / PACKED).iterdir()] == [packing.device_key(bundle)]


def test_verify_sees_what_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link there, and an expert that the disk has damaged, are a line each and exit 3; whole, it says nothing."""
    bundle = runnable.write_bundle(tmp_path / "bundle")
    use(bundle)
    assert CliRunner().invoke(main, ["verify", str(bundle.root)]).exit_code == 0
    (bundle.root / PACKED / "notes").symlink_to(tmp_path)
    monkeypatch.setattr(packing, "changed_ns", lambda _: json.loads(noted)["changed_ns"])
    folder = packing.packed_folder(bundle)
    noted = (folder / PACKING).read_bytes().partition(b"\n")[2]
    data = bytearray((folder / "experts.bin").read_bytes())
    data[7] ^= 1
    (folder / "experts.bin").write_bytes(data)
    result = CliRunner().invoke(main, ["verify", str(bundle.root)])
    assert result.exit_code == 3
    assert f"{bundle.root / PACKED / 'notes'}: is not what pocketmoe packs" in result.output
    assert f"{folder / 'experts.bin'}: the record of layer 0, expert 0" in result.output


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o027, 0o077])
def test_the_umask_holds_and_nobody_else_may_write(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        bundle = packed_bundle(tmp_path)
    finally:
        os.umask(before)
    folder = packing.packed_folder(bundle)
    for path in (bundle.root, folder.parent, folder):
        assert path.stat().st_mode & 0o777 == 0o755 & ~umask
    assert (folder / EXPERT_COUNTS).stat().st_mode & 0o777 == 0o600
