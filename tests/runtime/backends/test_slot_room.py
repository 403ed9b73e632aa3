"""Slots where shared memory is small, as in a container: 64 MB is docker's default for /dev/shm."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import ExpertId
from pocketmoe.runtime.backends import probe, slots
from pocketmoe.runtime.backends.sessions import SessionBackend
from pocketmoe.runtime.backends.slots import MappedSlot, SlotsUnavailable, open_slots
from pocketmoe.runtime.engine.claims import fit_slots
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.memory.budget import Budget
from tests.bundles import EXPERTS, LAYERS, scratch_folders, write_runnable

IDS = [ExpertId(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
PLENTY = 1 << 40


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle whose experts are the probe's, and whose other graphs nobody runs."""
    return write_runnable(tmp_path / "bundle")


def _say_free(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> None:
    usage = shutil.disk_usage(slots.SHARED_MEMORY)
    monkeypatch.setattr(slots.shutil, "disk_usage", lambda _: usage._replace(free=free_bytes))


def test_one_slot_gives_every_experts_own_result(bundle: Bundle) -> None:
    """Bit for bit that of a session, in whatever order they come."""
    x = np.random.default_rng(0).standard_normal((3, probe.HIDDEN), dtype=np.float32)
    with bundle.open_store() as store:
        backend, sessions = open_slots(bundle, store, PLENTY), SessionBackend(bundle, store)
        slot, session = backend.make_slot(0), sessions.make_slot(0)
        seen = []
        for expert in [*IDS, *IDS[::-1]]:
            slot.load(expert)
            session.load(expert)
            seen.append(slot.run(x))
            np.testing.assert_array_equal(seen[-1], session.run(x))
        assert len({y.tobytes() for y in seen}) == len(IDS)
        backend.close()
    assert not scratch_folders()


def test_what_slots_take_goes_when_the_process_is_killed(bundle: Bundle) -> None:
    """No file in memory has a name, which would outlive it."""
    with bundle.open_store() as store:
        backend = open_slots(bundle, store, PLENTY)
        backend.make_slot(0).load(IDS[0])
        (scratch,) = scratch_folders()
        assert not any(path.stat().st_blocks for path in scratch.rglob("*") if path.is_file() and not path.is_symlink())
        backend.close()


def test_much_too_little_shared_memory_means_sessions(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with bundle.open_store() as store:
        backend = open_slots(bundle, store, PLENTY)
        all_bytes = backend.all_bytes()
        backend.close()
        _say_free(monkeypatch, all_bytes // 2 - 1)
        with pytest.raises(SlotsUnavailable, match="MB free of the"):
            open_slots(bundle, store, PLENTY)
        assert not scratch_folders()
        open_slots(bundle, store, all_bytes // 2).close()  # enough for a budget that would not pay for more


def test_a_full_file_system_means_sessions(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with bundle.open_store() as store:
        open_slots(bundle, store, PLENTY).close()  # packs
        monkeypatch.setattr(MappedSlot, "__init__", fail)
        with pytest.raises(SlotsUnavailable, match="no room for a slot"):
            open_slots(bundle, store, PLENTY)
    assert not scratch_folders()


@pytest.mark.parametrize("request_", [MemoryRequest(total_bytes=PLENTY), MemoryRequest(expert_share=1.0)])
def test_slots_are_no_more_than_shared_memory_holds(
    bundle: Bundle, request_: MemoryRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bundle.open_store() as store:
        backend = open_slots(bundle, store, PLENTY)
        one = backend.mapped_bytes(0)
        assert fit_slots(Budget(PLENTY), request_, backend, {0: {0: 2, 1: 2}}) == {0: 4}
        _say_free(monkeypatch, 3 * one)
        assert fit_slots(Budget(PLENTY), request_, backend, {0: {0: 2, 1: 2}}) == {0: 3}
        backend.close()


@pytest.mark.parametrize("step", ["pack", "self_test"])
def test_an_onnxruntime_that_cannot_do_it_means_sessions(
    bundle: Bundle, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> NoReturn:
        raise Fail("unknown option")

    monkeypatch.setattr(slots, step, fail)
    with bundle.open_store() as store, pytest.raises(SlotsUnavailable, match="unknown option"):
        open_slots(bundle, store, PLENTY)
    assert not scratch_folders()


@pytest.mark.parametrize(("hidden", "count"), [(512, 260), (320, 400)])
def test_making_slots_takes_what_they_claim(hidden: int, count: int, tmp_path: Path) -> None:
    """Whatever the size of a matrix: blocks below a megabyte stayed in the heap, three times what a slot claims."""
    command = [sys.executable, "-m", "tests.runtime.backends.slot_growth", str(hidden), str(count), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["grew"] < found["claimed"] + (24 << 20), found
