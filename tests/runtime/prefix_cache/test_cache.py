"""The prefix cache on disk, over arrays: what it gives back is what it was given, whatever happens to its files."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import signal
import stat
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketmoe.bundle.manifest import State
from pocketmoe.bundle.progress import OnStep, no_step
from pocketmoe.cli import main
from pocketmoe.errors import BadInput, OutputError
from pocketmoe.runtime.prefix_cache.cache import PrefixCache
from pocketmoe.runtime.prefix_cache.entry import HEADER_BYTES
from pocketmoe.runtime.prefix_cache.folder import TAG, Folder
from tests.hang import HANG_S

CHUNK = 4
LARGE = 1 << 30
ROOT = b"model".ljust(32)
GROWING = [  # before, between and after the other axes
    State(input="keys", output="k", dtype="float32", shape=(1, 2, -1, 3), growing_axis=2, in_place=True),
    State(input="codes", output="c", dtype="int8", shape=(-1, 5), growing_axis=0),
    State(input="last", output="l", dtype="float16", shape=(2, -1), growing_axis=1),
]
OVERWRITTEN = [
    State(input="recurrent", output="r", dtype="float32", shape=(2, 3)),
    State(input="flags", output="f", dtype="bool", shape=(7,)),
]
KINDS = {"caches": GROWING, "recurrent": OVERWRITTEN, "both": [*GROWING, *OVERWRITTEN]}
BLOCK = HEADER_BYTES + sum(state.nbytes(CHUNK) for state in GROWING)


@contextmanager
def opened(
    path: Path, states: Sequence[State] = GROWING, most: int = LARGE, root: bytes = ROOT, on_step: OnStep = no_step
) -> Generator[PrefixCache]:
    with Folder.make(path, most, on_step) as folder:
        yield PrefixCache(folder, states, root, CHUNK, "MODEL")


def computed(states: Sequence[State], tokens: Sequence[int], capacity: int) -> dict[str, np.ndarray]:
    """What tokens leave: any function of a token and those before it for caches, of all tokens for states."""
    arrays: dict[str, np.ndarray] = {}
    for number, spec in enumerate(states):
        length = capacity if spec.in_place else len(tokens)
        shape = [length if axis == spec.growing_axis else size for axis, size in enumerate(spec.shape)]
        array = np.full(shape, 1, spec.dtype)
        for place in range(1 if spec.growing_axis is None else len(tokens)):
            seen = tokens if spec.growing_axis is None else tokens[: place + 1]
            rng = np.random.default_rng([number, *seen])
            part = array if spec.growing_axis is None else np.moveaxis(array, spec.growing_axis, 0)[place]
            part[...] = rng.integers(-99, 99, part.shape).astype(spec.dtype)
        arrays[spec.input] = array
    return arrays


def restored(cache: PrefixCache, states: Sequence[State], tokens: Sequence[int], capacity: int = 40) -> int:
    """How much of a text is kept, after what came back was held against what was computed."""
    filled: dict[str, np.ndarray] = {}

    def prepare(length: int) -> dict[str, np.ndarray]:
        filled.clear()
        for name, array in computed(states, tokens[:length], capacity).items():
            filled[name] = np.full_like(array, 7)
        return filled

    length = cache.restore(tokens, prepare)
    assert length % CHUNK == 0
    if length:
        expected = computed(states, tokens[:length], capacity)
        for spec in states:
            axis = spec.growing_axis
            found, right = filled[spec.input], expected[spec.input]
            if axis is not None:
                found, right = np.moveaxis(found, axis, 0)[:length], np.moveaxis(right, axis, 0)[:length]
            assert np.array_equal(found, right), spec.input
    return length


def listed(path: Path) -> list[str]:
    return sorted(place.name for place in path.iterdir())


def keep(cache: PrefixCache, states: Sequence[State], tokens: Sequence[int], capacity: int = 40) -> str:
    return cache.keep(tokens, computed(states, tokens, capacity))


TEXTS = st.lists(st.lists(st.integers(0, 1), max_size=9).map(lambda parts: [t for t in parts for _ in range(CHUNK)]),
                 min_size=1, max_size=6)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(texts=TEXTS, asked=TEXTS, cut=st.integers(0, 3))
def test_the_longest_kept_beginning_comes_back(
    kind: str, texts: list[list[int]], asked: list[list[int]], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Bit for bit, and as long as it was kept: any chunk for caches, where a text ended for states that overwrite."""
    states = KINDS[kind]
    with opened(tmp_path_factory.mktemp("cache"), states) as cache:
        ends: set[tuple[int, ...]] = set()
        for text in texts:
            assert not keep(cache, states, text)
            ends |= {tuple(text)} if kind != "caches" else {tuple(text[:e]) for e in range(0, len(text) + 1, CHUNK)}
        for text in [*texts, *asked]:
            text = text[: len(text) - cut]
            known = max((len(end) for end in ends if tuple(text[: len(end)]) == end), default=0)
            assert restored(cache, states, text) == known == cache.longest(text)


def test_texts_that_begin_alike_share_blocks(tmp_path: Path) -> None:
    """What is kept already is not written again; another model, or chunk, or token shares nothing."""
    with opened(tmp_path) as cache, Folder.open(tmp_path) as folder:
        keep(cache, GROWING, [1] * 12)
        before = {found.name: (tmp_path / found.name).stat().st_ino for found in folder.files()}
        keep(cache, GROWING, [1] * 8 + [2] * 8)
        after = {found.name: (tmp_path / found.name).stat().st_ino for found in folder.files()}
        assert len(before) == 3
        assert len(after) == 5
        assert before.items() <= after.items()
        assert all(found.nbytes == BLOCK for found in folder.files())
    with opened(tmp_path, root=b"other".ljust(32)) as other:
        assert other.longest([1] * 12) == 0


def test_it_is_for_its_owner_alone(tmp_path: Path) -> None:
    """A directory of 0700, also where it was there and open to others; files of 0600; backups leave it out."""
    path = tmp_path / "new" / "cache"
    path.mkdir(parents=True)
    path.chmod(0o755)
    with opened(path) as cache:
        keep(cache, GROWING, [1] * 8)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o600}
    assert (path / TAG).read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["header", "states", "length", "name"])
def test_a_damaged_file_is_ignored_and_removed(kind: str, where: str, tmp_path: Path) -> None:
    """Whatever is wrong with any one file: what comes before it comes back, and keeping the text again mends it."""
    states, text = KINDS[kind], [*range(12)]
    with opened(tmp_path, states) as cache, Folder.open(tmp_path) as folder:
        for end in (4, 8, 12):
            assert not keep(cache, states, text[:end])
        for found in folder.files():
            file = tmp_path / found.name
            data = bytearray(file.read_bytes())
            others = [other.name for other in folder.files() if other.name[65:] == found.name[65:] and other != found]
            if where == "header":
                data[data.index(b"sha256") + 12] ^= 1
            elif where == "states":
                data[-3] ^= 1
            elif where == "length":
                data = data[:-1]
            else:
                data = bytearray((tmp_path / others[0]).read_bytes())
            file.write_bytes(data)
            length = restored(cache, states, text)
            assert length < len(text) or (kind != "caches" and found.name.endswith(".state") and length == len(text))
            if where != "length" and length < len(text):
                assert not file.exists()
            for end in (4, 8, 12):
                assert not keep(cache, states, text[:end])
            assert restored(cache, states, text) == 12


HOSTILE: dict[str, Callable[[Path], object]] = {
    "a link to a file": lambda place: place.symlink_to("/etc/passwd"),
    "a link to nothing": lambda place: place.symlink_to("/nonexistent/file"),
    "a pipe": os.mkfifo,
    "a directory": lambda place: place.mkdir(),
    "a huge file": lambda place: os.close(_sparse(place, 1 << 40)),
    "a file of the right size": lambda place: os.close(_sparse(place, BLOCK)),
    "deep JSON": lambda place: place.write_bytes(b"[" * HEADER_BYTES + bytes(BLOCK - HEADER_BYTES)),
}


def _sparse(place: Path, nbytes: int) -> int:
    fd = os.open(place, os.O_WRONLY | os.O_CREAT)
    os.truncate(fd, nbytes)
    return fd


@pytest.mark.parametrize("what", HOSTILE)
def test_what_lies_under_a_files_name_harms_nobody(what: str, tmp_path: Path) -> None:
    """Nothing is followed, waited for or read without end; text comes back as far as real blocks go."""
    path, victim = tmp_path / "cache", tmp_path / "victim"
    victim.write_text("mine")
    with opened(path) as cache, Folder.open(path) as folder:
        keep(cache, GROWING, [1] * 8)
        names = sorted(found.name for found in folder.files())
        (path / names[0]).unlink()
        HOSTILE[what](path / names[0])
        assert restored(cache, GROWING, [1] * 8) in (0, 4)
        keep(cache, GROWING, [1] * 8)
        assert victim.read_text() == "mine"
        assert Path("/etc/passwd").stat().st_size
        folder.clear()


def test_a_cache_full_of_foreign_giants_still_keeps(tmp_path: Path) -> None:
    """Files that are larger than all may be, or from the future, go first."""
    with opened(tmp_path, most=3 * BLOCK) as cache, Folder.open(tmp_path) as folder:
        keep(cache, GROWING, [1] * 4)
        _sparse(tmp_path / f"{'a' * 64}.block", 1 << 40)
        assert not keep(cache, GROWING, [2] * 4)
        assert len(folder.files()) == 2
        future = tmp_path / f"{'b' * 64}.block"
        os.close(_sparse(future, BLOCK))
        os.utime(future, ns=(1 << 62, 1 << 62))
        assert not keep(cache, GROWING, [3] * 4)
        assert not future.exists()
        assert restored(cache, GROWING, [1] * 4) == 4


@pytest.mark.parametrize("make", [
    lambda path: path.write_text("x"),
    lambda path: path.symlink_to("/tmp"),
    lambda path: (path.mkdir(), (path / "thesis.tex").write_text("x")),
    lambda path: (path.mkdir(), (path / TAG).write_text("Signature: 8a477f597d28d172789f06886806bc55"),
                  (path / "other").write_text("x")),
])  # fmt: skip
def test_a_place_that_is_something_else_is_refused(make: Callable[[Path], object], tmp_path: Path) -> None:
    """A file, a link, a directory of other things, also another program's cache: nothing in it changes."""
    path = tmp_path / "place"
    make(path)
    before = listed(path) if path.is_dir() else path.read_text()
    for opening in (lambda: Folder.make(path, LARGE), lambda: Folder.open(path)):
        with pytest.raises(BadInput, match="prefix cache"):
            opening()
    assert before == (listed(path) if path.is_dir() else path.read_text())
    with pytest.raises((BadInput, OutputError)):
        Folder.make(Path("/proc/nowhere/cache"), LARGE)
    with pytest.raises(BadInput, match="No such file"):
        Folder.open(tmp_path / "none")


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    """Of what was used longest ago the end goes before the beginning; a use counts; no more is kept than allowed."""
    with opened(tmp_path, most=5 * BLOCK) as cache, Folder.open(tmp_path) as folder:
        keep(cache, GROWING, [1] * 8)
        keep(cache, GROWING, [2] * 8)
        assert restored(cache, GROWING, [1] * 8) == 8
        keep(cache, GROWING, [3] * 8)
        assert [cache.longest([t] * 8) for t in (1, 2, 3)] == [8, 4, 8]
        remark = keep(cache, GROWING, [4] * 40)
        assert "keeps 20 of 40 tokens" in remark
        assert cache.longest([4] * 40) == 20
        assert sum(found.nbytes for found in folder.files()) <= 5 * BLOCK
    with opened(tmp_path, most=2 * BLOCK) as cache:
        assert cache.longest([4] * 40) == 8
    with opened(tmp_path, most=BLOCK - 1) as cache:
        assert "keeps 0 of 4" in keep(cache, GROWING, [5] * 4)
        assert cache.longest([4] * 40) == 0


def test_a_full_disk_is_a_remark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing half-written stays, what was kept is kept, and with room again it goes on."""
    real = os.posix_fallocate
    calls = iter([True, False])

    def full(fd: int, offset: int, nbytes: int) -> None:
        if not next(calls, False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd, offset, nbytes)

    with opened(tmp_path) as cache:
        monkeypatch.setattr(os, "posix_fallocate", full)
        assert "keeps 4 of 12 tokens (No space left on device)" in keep(cache, GROWING, [1] * 12)
        assert not [name for name in listed(tmp_path) if name.endswith(".partial")]
        assert cache.longest([1] * 12) == 4
        monkeypatch.undo()
        assert not keep(cache, GROWING, [1] * 12)
        assert restored(cache, GROWING, [1] * 12) == 12


def _forked(work: Callable[..., object], *arguments: Any) -> int:
    """The exit code of a child that does it."""
    child = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    child.start()
    child.join(HANG_S)
    assert child.exitcode is not None
    return child.exitcode


def _keep_until(path: Path, step: int, kind: str) -> None:
    steps = iter(range(1000))

    def on_step(_: str) -> None:
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    with opened(path, KINDS[kind], on_step=on_step) as cache:
        keep(cache, KINDS[kind], [1] * 8)
    os._exit(7)  # it had fewer steps


@pytest.mark.parametrize("kind", ["caches", "both"])
def test_killed_at_any_step_it_is_whole(kind: str, tmp_path: Path) -> None:
    """What is there is right, the next one keeps the rest, and nothing of the killed one stays."""
    step, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        path = tmp_path / str(step)
        code = _forked(_keep_until, path, step, kind)
        with opened(path, KINDS[kind]) as cache, Folder.open(path) as folder:
            restored(cache, KINDS[kind], [1] * 8)
            assert not keep(cache, KINDS[kind], [1] * 8)
            assert not keep(cache, KINDS[kind], [2] * 4)
            assert restored(cache, KINDS[kind], [1] * 8) == 8
            assert set(listed(path)) == {TAG, *(found.name for found in folder.files())}
        step += 1
    assert code == 7
    assert step > 8


def _many(path: Path, seed: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    with opened(path, KINDS["both"], most) as cache:
        for _ in range(40):
            text = np.repeat(rng.integers(0, 2, 4), CHUNK).tolist()
            restored(cache, KINDS["both"], text)
            keep(cache, KINDS["both"], text)


@pytest.mark.parametrize("most", [LARGE, 6 * BLOCK + 100])
def test_processes_share_it(most: int, tmp_path: Path) -> None:
    """Three at once, restoring, keeping and making room: all that any of them gets is right, and the size is kept."""
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=_many, args=(tmp_path, seed, most)) for seed in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(HANG_S)
    assert [child.exitcode for child in children] == [0, 0, 0]
    with Folder.open(tmp_path) as folder:
        assert sum(found.nbytes for found in folder.files()) <= most
        assert {*listed(tmp_path)} == {TAG, *(found.name for found in folder.files())}


def test_clearing_takes_what_is_ours(tmp_path: Path) -> None:
    """All files of the cache and, if nothing else is in it, the directory; another file stays, and so does it."""
    path = tmp_path / "cache"
    for other in (False, True):
        with opened(path) as cache, Folder.open(path) as folder:
            keep(cache, GROWING, [1] * 8)
            if other:
                (path / "notes.txt").write_text("mine")
            assert len(folder.clear()) == 2
            assert path.exists() == other
    assert listed(path) == [TAG, "notes.txt"]


def test_the_command_lists_and_clears(tmp_path: Path) -> None:
    """By model, for people and programs; a damaged file is one; what is no prefix cache is refused with exit 3."""
    path = tmp_path / "cache"
    with opened(path) as cache:
        keep(cache, GROWING, [1] * 8)
    (path / f"{'0' * 64}.block").write_text("x")
    listing = json.loads(command(path, "--json"))
    assert listing["files"] == 3
    assert listing["nbytes"] == 2 * BLOCK + 1
    assert {(part["model"], part["files"], part["longest_tokens"]) for part in listing["models"]} == {
        ("MODEL", 2, 8),
        ("(damaged)", 1, 0),
    }
    table = command(path)
    assert "MODEL" in table
    assert "8 tokens" in table
    assert "Removed 3 files" in command(path, "--clear")
    assert not path.exists()
    for arguments, code in (([path], 3), ([tmp_path.parent], 3), ([tmp_path, "--list", "--clear"], 2)):
        (tmp_path / "other").write_text("x")
        done = CliRunner().invoke(main, ["prefix-cache", *map(str, arguments)])
        assert done.exit_code == code, done.output
    assert (tmp_path / "other").exists()


def command(*arguments: object) -> str:
    done = CliRunner().invoke(main, ["prefix-cache", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.output


def test_a_read_only_cache_is_read(tmp_path: Path) -> None:
    """Files that cannot be written, by a limit on their size, are a remark, and what is there is used."""
    with opened(tmp_path) as cache:
        keep(cache, GROWING, [1] * 8)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        with opened(tmp_path) as cache:
            assert restored(cache, GROWING, [1] * 12) == 8
            assert "keeps 8 of 12" in keep(cache, GROWING, [1] * 12)
        os._exit(0)

    assert _forked(limited) == 0
