"""Experts that are kept once, as one machine packed them: nothing computed changes, and nothing is ever lost."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from pocketmoe.bundle import in_place
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.stream import worker_pool
from pocketmoe.bundle.writer import write_with_graphs
from pocketmoe.cli import main
from pocketmoe.errors import BadInput, DamagedFile, UnsupportedModel
from pocketmoe.quantize.apply import quantize_bundle
from pocketmoe.runtime.backends import pack_in_place as moving
from pocketmoe.runtime.backends import packing, slots
from pocketmoe.runtime.backends.pack_in_place import find_places, pack_in_place, unpack_in_place
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.verification import verify

TOKENS = [3, 7, 1, 9, 4, 250, 17, 33]


class Stop(Exception):
    """What ends a run in its middle."""


def stop_at(count: int) -> Callable[[str, int, int], None]:
    """A progress that raises Stop when it is told for the `count`th time."""
    told = 0

    def progress(what: str, done: int, total: int) -> None:
        nonlocal told
        told += 1
        if told == count:
            raise Stop

    return progress


def logits(bundle: Bundle, backend: str) -> np.ndarray:
    options = EngineOptions(MemoryRequest.parse("100%"), 32, 1, backend)  # pyright: ignore[reportArgumentType]
    with Engine(Bundle.open(bundle.root), options) as engine:
        assert engine.opened.backend == backend, engine.opened.backend_reason
        return engine.feed(TOKENS, rows="all")


def disk_bytes(bundle: Bundle) -> int:
    """What the published experts take on disk; holes are none."""
    return bundle.path("experts.bin").stat().st_blocks * 512


@pytest.fixture(scope="module")
def made(tiny_bundle: Callable[[str], Bundle], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """made(scheme): a bundle with experts in two layers. Read only."""
    folder = tmp_path_factory.mktemp("in_place")

    @cache
    def make(scheme: str) -> Bundle:
        plain = tiny_bundle("olmoe").root
        if scheme == "fp32":
            return Bundle.open(shutil.copytree(plain, folder / scheme, ignore=shutil.ignore_patterns("packed")))
        return quantize_bundle(plain, folder / scheme, scheme=scheme)

    return make


@pytest.fixture
def bundle(made: Callable[[str], Bundle], request: pytest.FixtureRequest) -> Bundle:
    """By int4, or as a test says. Read only."""
    return made(getattr(request, "param", "int4"))


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(bundle.root, tmp_path / "bundle"))


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


@pytest.mark.parametrize("bundle", ["fp32", "int8", "int4", "nf4"], indirect=True)
def test_once_on_disk_and_the_same_in_all_that_is_computed(bundle: Bundle, copy: Bundle, scratch: Path) -> None:
    expected = {backend: logits(copy, backend) for backend in ("slots", "sessions")}
    before = disk_bytes(copy)
    pack_in_place(copy, scratch)
    assert disk_bytes(copy) < before / 2
    assert list(verify(Bundle.open(copy.root))) == []
    for backend, rows in expected.items():
        np.testing.assert_array_equal(logits(copy, backend), rows)
    unpack_in_place(copy)
    assert copy.path("experts.bin").read_bytes() == bundle.path("experts.bin").read_bytes()
    assert list(copy.root.glob("packed/*")) == []


def test_whatever_is_made_of_it_is_what_would_be_made_of_the_other(
    bundle: Bundle, copy: Bundle, scratch: Path, tmp_path: Path
) -> None:
    pack_in_place(copy, scratch)
    made = write_with_graphs(Bundle.open(copy.root), tmp_path / "made", {}, copy.manifest)
    assert made.path("experts.bin").read_bytes() == bundle.path("experts.bin").read_bytes()
    assert list(verify(made)) == []


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_stopped_run_loses_nothing_and_is_gone_on_with(
    bundle: Bundle, tmp_path: Path, scratch: Path, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moving, "AT_ONCE", at_once)
    with bundle.open_store() as store:
        steps = len(store.records) + 2
    for stop in range(2, steps, 5):
        copy = Bundle.open(shutil.copytree(bundle.root, tmp_path / f"packed {stop}"))
        with pytest.raises(Stop):
            pack_in_place(copy, scratch, stop_at(stop))
        with pytest.raises(BadInput, match="being packed in place"):
            copy.open_store()
        if stop % 2:  # taken back at once
            unpack_in_place(copy)
            assert copy.path("experts.bin").read_bytes() == bundle.path("experts.bin").read_bytes()
        pack_in_place(Bundle.open(copy.root), scratch)
        assert list(verify(Bundle.open(copy.root))) == []
        with pytest.raises(Stop):
            unpack_in_place(copy, stop_at(stop))
        with Bundle.open(copy.root).open_store() as store:  # half here, half there
            for expert in store.records:
                store.read(expert)
        unpack_in_place(copy)
        assert copy.path("experts.bin").read_bytes() == bundle.path("experts.bin").read_bytes()


def test_another_machine_says_so_and_packs_anew(
    copy: Bundle, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(copy, "slots")
    pack_in_place(copy, scratch)
    before = disk_bytes(copy)
    monkeypatch.setattr(packing, "device_key", lambda _: "0123456789abcdef")
    monkeypatch.setattr(moving, "device_key", lambda _: "0123456789abcdef")
    with pytest.raises(BadInput, match="only as another CPU"):
        logits(copy, "slots")
    with pytest.raises(Stop):
        pack_in_place(copy, scratch, stop_at(4))
    pack_in_place(copy, scratch)
    assert disk_bytes(copy) == before
    assert [path.name for path in copy.root.glob("packed/*")] == ["0123456789abcdef"]
    np.testing.assert_array_equal(logits(copy, "slots"), expected)


def test_a_copy_has_to_be_packed_anew_since_whoever_copied_it_may_have_changed_it(
    copy: Bundle, scratch: Path, tmp_path: Path
) -> None:
    expected = logits(copy, "slots")
    pack_in_place(copy, scratch)
    moved = Bundle.open(shutil.copytree(copy.root, tmp_path / "moved"))
    with pytest.raises(BadInput, match="only as another CPU"):
        logits(moved, "slots")
    pack_in_place(moved, scratch)
    np.testing.assert_array_equal(logits(moved, "slots"), expected)
    assert list(verify(Bundle.open(moved.root))) == []


@pytest.mark.parametrize("name", ["experts.bin", "kind_0.places", "in_place.json"])
@pytest.mark.parametrize("where", [0.0, 0.3, 0.99])
def test_a_changed_byte_is_damage_wherever_it_is(copy: Bundle, scratch: Path, name: str, where: float) -> None:
    pack_in_place(copy, scratch)
    (path,) = copy.root.glob(f"packed/*/{name}")
    with open(path, "r+b") as file:
        at = int(where * path.stat().st_size)
        file.seek(at)
        (old,) = file.read(1)
        file.seek(at)
        file.write(bytes([old ^ 0x55]))
    with pytest.raises(DamagedFile):
        unpack_in_place(copy)


def test_what_others_have_too_is_left_alone(copy: Bundle, scratch: Path, tmp_path: Path) -> None:
    store = copy.path("experts.bin")
    os.link(store, tmp_path / "another name")
    before = store.read_bytes()
    with pytest.raises(BadInput, match="belongs to others"):
        pack_in_place(copy, scratch)
    assert store.read_bytes() == before
    assert not list(copy.root.glob("packed/*"))


def test_one_process_at_a_time(copy: Bundle, scratch: Path) -> None:
    def other(what: str, done: int, total: int) -> None:
        with pytest.raises(BadInput, match="another process"):
            pack_in_place(copy, scratch)
        raise Stop

    with pytest.raises(Stop):
        pack_in_place(copy, scratch, other)


def test_the_command(copy: Bundle) -> None:
    run = CliRunner().invoke
    for arguments in ([], ["--in-place"], ["--in-place"], ["--undo"], ["--undo"]):
        done = run(main, ["pack", str(copy.root), *arguments])
        assert done.exit_code == 0, done.output
    assert run(main, ["verify", str(copy.root)]).exit_code == 0


class Shuffling:
    """Packs as kernels may: nibbles moved, some flipped, some lost, some twice, others between them."""

    def __init__(self, rng: np.random.Generator, count: int, lost: int) -> None:
        self._order, self._flips = rng.permutation(count)[lost:], rng.integers(0, 16, count - lost)
        self.lost = set(range(count)) - set(self._order.tolist())

    def pack_live(self, record: memoryview) -> bytes:
        given = np.stack([np.frombuffer(record, np.uint8) & 15, np.frombuffer(record, np.uint8) >> 4], 1).reshape(-1)
        sums = (given.astype(int).sum() + np.arange(6)) % 16  # computed from all, and equal to one here and there
        moved = given[self._order] ^ self._flips
        came = np.concatenate([moved, sums, moved[:3] ^ 1]).astype(np.uint8)
        came = np.pad(came, (0, len(came) % 2))
        return (came[0::2] | came[1::2] << 4).tobytes()


@given(nbytes=st.integers(1, 3000), lost=st.integers(0, 40), seed=st.integers(0, 1 << 32))
def test_places_are_found_for_whatever_moves_nibbles(nbytes: int, lost: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    record, other = rng.bytes(nbytes), rng.bytes(nbytes)
    packer = Shuffling(rng, 2 * nbytes, min(lost, 2 * nbytes))
    places = find_places(packer, memoryview(record))  # pyright: ignore[reportArgumentType]
    assert set(np.flatnonzero(places == in_place.NOWHERE).tolist()) == packer.lost
    packed = np.frombuffer(packer.pack_live(memoryview(other)), np.uint8)
    left = np.zeros(in_place.padded(nbytes), np.uint8)
    left[:nbytes] = np.frombuffer(other, np.uint8)
    for offset, length in in_place.punched_pages(places):
        left[offset : offset + length] = 0
    assert bytes(in_place.restore(packed, places, left[:nbytes])) == other
    covered = np.zeros(in_place.padded(nbytes), int)
    for offset, length in [*in_place.punched_pages(places), *in_place.kept_pages(places)]:
        covered[offset : offset + length] += 1
    assert (covered == 1).all()


def folding(*pages: int) -> Callable[..., np.ndarray]:
    """`find_places` for a CPU that folds something of these pages of a record into other numbers."""

    def find(packer: packing.Packer, record: memoryview) -> np.ndarray:
        places = find_places(packer, record)
        for page in pages:
            places[8192 * page + 5 : 8192 * page + 90] = in_place.NOWHERE
        return places

    return find


@pytest.mark.parametrize("bundle", ["fp32"], indirect=True)
@pytest.mark.parametrize("undone_at", [1, 3, 6, 11, None])
def test_what_packing_folds_stays(
    bundle: Bundle, copy: Bundle, scratch: Path, undone_at: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one machine, then on another that folds something else; taken back there, at any moment."""
    expected = logits(copy, "sessions")
    monkeypatch.setattr(moving, "AT_ONCE", 2)
    monkeypatch.setattr(moving, "find_places", folding(0))
    pack_in_place(copy, scratch)
    np.testing.assert_array_equal(logits(copy, "slots"), expected)
    monkeypatch.setattr(packing, "device_key", lambda _: "0123456789abcdef")
    monkeypatch.setattr(moving, "device_key", lambda _: "0123456789abcdef")
    monkeypatch.setattr(moving, "find_places", folding(1))
    if undone_at is None:
        pack_in_place(copy, scratch)
        np.testing.assert_array_equal(logits(copy, "slots"), expected)
    else:
        with pytest.raises(Stop):
            pack_in_place(copy, scratch, stop_at(undone_at))
    unpack_in_place(copy)
    assert copy.path("experts.bin").read_bytes() == bundle.path("experts.bin").read_bytes()
    assert list(copy.root.glob("packed/*")) == []


def test_what_packing_loses_cannot_be_kept_so(copy: Bundle, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = copy.path("experts.bin").read_bytes()
    monkeypatch.setattr(moving, "find_places", lambda _, record: np.full(2 * len(record), in_place.NOWHERE))
    with pytest.raises(UnsupportedModel, match="cannot be read back"):
        pack_in_place(copy, scratch)
    assert copy.path("experts.bin").read_bytes() == before
    assert list(copy.root.glob("packed/*")) == []


def test_threads_stop_when_a_run_is_stopped(copy: Bundle, scratch: Path) -> None:
    with worker_pool(1), pytest.raises(Stop):
        pack_in_place(copy, scratch, stop_at(3))
    assert in_place.unfinished_folder(copy.root) is not None


def test_a_new_bundle_is_packed_as_it_is_written(
    bundle: Bundle, tiny_bundle: Callable[[str], Bundle], tmp_path: Path
) -> None:
    """`--packed` of the commands that write bundles: the same numbers, experts on disk once, nothing to pack later."""
    plain = tiny_bundle("olmoe").root
    target = tmp_path / "packed"
    done = CliRunner().invoke(main, ["quantize", str(plain), "-o", str(target), "--scheme", "int4", "--packed"])
    assert done.exit_code == 0, done.output
    made = Bundle.open(target)
    assert disk_bytes(made) < bundle.path("experts.bin").stat().st_size
    assert [folder.name for folder in (target / "packed").iterdir()] == [packing.device_key(made)]
    assert list(verify(made)) == []
    assert np.array_equal(logits(made, "slots"), logits(bundle, "slots"))


@pytest.mark.parametrize("how", [[], ["--in-place"]])
def test_without_a_folder_in_memory_it_is_a_line(
    copy: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: list[str]
) -> None:
    monkeypatch.setattr(slots, "SHARED_MEMORY", tmp_path / "none")
    done = CliRunner().invoke(main, ["pack", str(copy.root), *how])
    assert done.exit_code == 3
    assert "cannot be written" in done.output
    assert len(done.output.splitlines()) == 1
