"""What the system limits beside memory: open files, memory maps, and what killed processes leave in it."""

from __future__ import annotations

import gc
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import ExpertId
from pocketmoe.errors import LimitReached
from pocketmoe.profiles.machine import limit
from pocketmoe.runtime.backends import probe, slots
from pocketmoe.runtime.backends.sessions import SessionBackend
from pocketmoe.runtime.backends.slots import SlotBackend, memory_scratch, open_slots
from pocketmoe.runtime.engine.claims import fit_slots
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.memory.budget import Budget
from pocketmoe.runtime.memory.limits import Limits, read_limits
from tests.bundles import write_runnable
from tests.hang import HANG_S

REPOSITORY = Path(__file__).parents[3]
PLENTY = 1 << 40
N_LAYERS, N_EXPERTS = 2, 2  # of the manifest; slots are as many as experts
MANY = 150


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_runnable(tmp_path / "bundle")


@pytest.fixture
def many(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlotBackend]:
    """A backend with room for many slots of the bundle's few experts."""
    real = slots.SlotFile.__init__

    def wider(self: slots.SlotFile, packed: object, kind: int, scratch: Path, n_slots: int) -> None:
        real(self, packed, kind, scratch, n_slots if n_slots == 1 else MANY)  # type: ignore[arg-type]

    monkeypatch.setattr(slots.SlotFile, "__init__", wider)
    with bundle.open_store() as store:
        backend = open_slots(bundle, store, PLENTY)
        yield backend
        backend.close()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) - 1  # noqa: PTH208 - their number alone


def test_slots_keep_no_file_open_and_map_their_packed_weights_alone(bundle: Bundle, many: SlotBackend) -> None:
    """Under a limit of a few files more than are open, each of many slots gives its expert's own bits."""
    x = np.random.default_rng(0).standard_normal((3, probe.HIDDEN), dtype=np.float32)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    experts = [ExpertId(layer, expert) for layer in range(N_LAYERS) for expert in range(N_EXPERTS)]
    with bundle.open_store() as store:
        session = SessionBackend(bundle, store).make_slot(0)
        gc.collect()  # else what earlier tests left is closed while these files are counted
        files, maps = open_files(), read_limits().maps_used
        resource.setrlimit(resource.RLIMIT_NOFILE, (files + 8, hard))
        try:
            made = [many.make_slot(0) for _ in range(MANY)]
            for number, slot in enumerate(made):
                slot.load(experts[number % len(experts)])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert open_files() == files
        assert read_limits().maps_used - maps <= 3 * MANY + 64
        for expert in experts:
            session.load(expert)
            wanted = session.run(x)
            for number, slot in enumerate(made):
                if experts[number % len(experts)] == expert:
                    assert np.array_equal(slot.run(x), wanted), number


def test_where_no_file_can_be_opened_it_is_one_line(many: SlotBackend) -> None:
    """ONNX Runtime must open the slots' file for a moment; its error for want of one names what to do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(LimitReached) as caught:
            many.make_slot(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "ulimit -n" in caught.value.one_line()
    assert "\n" not in caught.value.one_line()
    assert caught.value.exit_code == 3
    many.make_slot(0)


@pytest.mark.parametrize("request_", [MemoryRequest(total_bytes=PLENTY), MemoryRequest(expert_share=1.0)])
def test_slots_are_no_more_than_may_be_mapped(
    bundle: Bundle, request_: MemoryRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With maps for three slots of three weights there are three, and a reason is given; with enough there is none."""
    for maps_left, wanted in ((3 * 3, 3), (3 * 4, 4), (10**6, 4), (0, 2)):
        limits = Limits(1024, 4096, maps=(used := 10**5) + 4096 + maps_left, maps_used=used)
        assert limits.maps_for_slots == maps_left
        monkeypatch.setattr(slots, "read_limits", lambda limits=limits: limits)
        with bundle.open_store() as store:
            backend = open_slots(bundle, store, PLENTY)
            assert fit_slots(Budget(PLENTY), request_, backend, {0: {0: 2, 1: 2}}) == {0: wanted}
            assert ("vm.max_map_count" in backend.limited) == (maps_left < 3 * 4)
            backend.close()


HOLD = """
import time
from pocketmoe import process
from pocketmoe.runtime.backends.slots import memory_scratch
process.unwind_on_signals()
with memory_scratch() as folder:
    (folder / "data").write_bytes(b"x")
    print(folder, flush=True)
    time.sleep(600)
"""


def hold() -> tuple[subprocess.Popen[str], Path]:
    """A process that has a scratch folder in memory, and the folder."""
    child = subprocess.Popen([sys.executable, "-c", HOLD], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert child.stdout
    return child, Path(child.stdout.readline().strip())


def test_what_a_killed_process_left_in_memory_goes_and_what_a_living_one_has_stays() -> None:
    """A lock tells them apart, so that a process id that means nothing in this container does not matter."""
    child, folder = hold()
    with child, memory_scratch() as mine:
        assert folder.is_dir()
        assert folder != mine
        child.kill()
        child.wait()
        assert folder.is_dir()
        with memory_scratch():
            assert not folder.exists()
            assert mine.is_dir()
    assert not mine.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_end_leaves_nothing_in_memory(number: int) -> None:
    child, folder = hold()
    with child:
        child.send_signal(number)
        assert child.wait(timeout=HANG_S) == 128 + number
    assert not folder.exists()


def test_a_link_called_as_a_scratch_folder_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system in memory belongs to everybody: whatever lies there under our names."""
    monkeypatch.setattr(slots, "SHARED_MEMORY", tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("mine")
    (tmp_path / ".pocketmoe.01234567.partial").symlink_to(tmp_path / "home")
    (tmp_path / ".pocketmoe.89abcdef.partial").mkdir()
    (tmp_path / ".pocketmoe.89abcdef.partial/thesis.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with memory_scratch() as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
    assert sorted(tmp_path.rglob("*")) == before


CGROUP = """
import sys, time
from pocketmoe.profiles.machine.limit import _cgroup
with _cgroup(None) as group:
    print(group, flush=True)
    time.sleep(600)
"""


def test_a_killed_runs_memory_cgroup_is_removed_by_the_next() -> None:
    """And a living one's is not, though nothing runs in it yet."""
    child = subprocess.Popen([sys.executable, "-c", CGROUP], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout
        line = child.stdout.readline().strip()
        if not line:
            pytest.skip("no memory cgroup can be made here")
        group = Path(line)
        assert limit.run_limited(["true"], None).returncode == 0
        assert group.is_dir()
        child.kill()
        child.wait()
        assert limit.run_limited(["true"], None).returncode == 0
        assert not group.exists()
