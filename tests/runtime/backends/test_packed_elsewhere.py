"""Experts packed outside of a bundle that cannot be written: the same tokens, in a place that is the user's alone."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from pocketmoe.bundle import packed as place_module
from pocketmoe.bundle.packed import PACKED, PackedPlace, look
from pocketmoe.bundle.reader import Bundle
from pocketmoe.cli import main
from pocketmoe.errors import BadInput, OutputError
from pocketmoe.runtime.backends import packing
from pocketmoe.runtime.backends.choice import open_backend
from pocketmoe.runtime.backends.slots import SHARED_MEMORY, open_slots
from tests.bundles import write_runnable

PLENTY = 1 << 40


def use(bundle: Bundle) -> int:
    """Pack it where that was not done; which file the packed experts are in."""
    with bundle.open_store() as store:
        open_slots(bundle, store, PLENTY).close()
    return packing.packed_folder(bundle).joinpath("experts.bin").stat().st_ino


def make_unwritable(monkeypatch: pytest.MonkeyPatch) -> None:
    """As root the tests could write a read-only directory."""
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK or Path(path) == SHARED_MEMORY)


def test_a_bundle_that_cannot_be_written_is_packed_into_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once; the place is made for its user alone, says whose it holds, and is emptied. Others go on as they are."""
    root, place = write_runnable(tmp_path / "bundle").root, PackedPlace(tmp_path / "cache" / PACKED)
    use(Bundle.open(root, place))
    assert not place.directory.exists()
    shutil.rmtree(root / PACKED)
    make_unwritable(monkeypatch)
    opened = Bundle.open(root, place)
    assert use(opened) == use(opened)
    assert not (root / PACKED).exists()
    assert stat.S_IMODE(place.directory.stat().st_mode) == 0o700
    (part,) = look(place.directory).bundles
    assert (part.bundle, part.seal, part.is_there) == (str(root), opened.manifest.sha256, True)
    assert part.nbytes > opened.path("experts.bin").stat().st_size / 2
    shutil.rmtree(root)
    listed = json.loads(CliRunner().invoke(main, ["packed", str(place.directory), "--json"]).stdout)
    assert [part["is_there"] for part in listed["bundles"]] == [False]
    (place.directory / "thesis.txt").write_text("mine")
    assert CliRunner().invoke(main, ["packed", str(place.directory), "--clear"]).exit_code == 0
    assert [path.name for path in place.directory.iterdir()] == ["thesis.txt"]


def test_a_place_that_is_named_is_for_every_bundle_and_its_own_is_used_where_it_is(tmp_path: Path) -> None:
    """Two bundles share it without sharing a folder; what is packed inside a bundle already is not packed again."""
    place = PackedPlace(tmp_path / "place", always=True)
    for name in ("one", "other"):
        made = write_runnable(tmp_path / name)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(made.root / PACKED)
        use(Bundle.open(made.root, place))
        assert not (made.root / PACKED).exists()
    use(made)
    assert packing.packed_home(Bundle.open(made.root, place)) == made.root / PACKED


def link(directory: Path) -> None:
    directory.rename(directory.with_name("real"))
    directory.symlink_to("real")


def file(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.write_text("mine")


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda place: place.chmod(0o770), id="others may write"),
        pytest.param(lambda place: place.chmod(0o702), id="all may write"),
        pytest.param(link, id="link"),
        pytest.param(file, id="file"),
        pytest.param(
            lambda place: os.chown(place, 12345, 12345),
            id="another's",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away"),
        ),
    ],
)
def test_a_place_that_others_can_fill_is_not_believed(
    tmp_path: Path, spoil: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named, it is refused; as the default it counts for nothing, and runs are slower."""
    root, directory = write_runnable(tmp_path / "bundle").root, tmp_path / "place"
    make_unwritable(monkeypatch)
    use(Bundle.open(root, PackedPlace(directory)))
    spoil(directory)
    assert packing.packed_home(Bundle.open(root, PackedPlace(directory))) == root / PACKED
    with pytest.raises(BadInput, match="no directory of yours alone"):
        packing.packed_home(Bundle.open(root, PackedPlace(directory, always=True)))
    done = CliRunner().invoke(main, ["pack", str(root), "--packed-dir", str(directory)])
    assert done.exit_code == 3
    assert done.stderr.count("\n") == 1


def test_what_is_copied_into_the_place_is_packed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what this machine has packed there is used, as in a bundle's own packed/."""
    root = write_runnable(tmp_path / "bundle").root
    make_unwritable(monkeypatch)
    use(Bundle.open(root, PackedPlace(tmp_path / "place")))
    shutil.copytree(tmp_path / "place", tmp_path / "copy")
    (tmp_path / "copy").chmod(0o700)
    assert packing.open_packed(Bundle.open(root, PackedPlace(tmp_path / "copy"))) is None


def test_too_little_space_is_said_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place takes half of what is free at most: else sessions run, which is said first."""
    root = write_runnable(tmp_path / "bundle").root
    bundle, said = Bundle.open(root, PackedPlace(tmp_path / "place", always=True)), list[str]()
    usage = shutil.disk_usage(tmp_path)._replace(free=bundle.path("experts.bin").stat().st_size)
    monkeypatch.setattr(place_module.shutil, "disk_usage", lambda _: usage)
    with bundle.open_store() as store:
        backend, why = open_backend("auto", bundle, store, PLENTY, lambda what, *_: said.append(what))
    with contextlib.closing(backend):
        assert "more than half" in why
        assert said == [f"experts run in sessions, which is slower: {why}"]
    assert not (root / PACKED).exists()


def test_a_folder_with_files_of_others_stays(tmp_path: Path) -> None:
    """Clearing removes what packing makes, by name, and says what it leaves."""
    root, directory = write_runnable(tmp_path / "bundle").root, tmp_path / "place"
    bundle = Bundle.open(root, PackedPlace(directory, always=True))
    use(bundle)
    (directory / bundle.manifest.sha256 / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="cannot be cleared"):
        look(directory, clear=True)
    assert [path.name for path in directory.rglob("*") if path.is_file()] == ["thesis.txt"]
