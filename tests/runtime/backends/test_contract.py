"""What every backend keeps, whatever holds its experts: the pager and the memory plan rely on nothing else."""

# pyright: reportArgumentType=false

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from pocketmoe.bundle.manifest import STORE
from pocketmoe.bundle.packed import PACKING
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import ExpertId, StoreReader
from pocketmoe.errors import DamagedFile
from pocketmoe.quantize.float_backend import FloatBackend
from pocketmoe.runtime.backends.protocol import Backend, Slot
from pocketmoe.runtime.backends.sessions import SessionBackend
from pocketmoe.runtime.backends.slots import open_slots
from pocketmoe.system.memory import process_bytes
from tests import bundles, runnable
from tests.twin import TwinBackend, factor

PLENTY = 1 << 40
PYTHON_BYTES = 1 << 18  # what the test itself may touch between two looks at the process
BROKEN = ExpertId(1, 1)
EXPERTS = [ExpertId(0, 0), ExpertId(0, 1), ExpertId(1, 0), BROKEN]


def slots(bundle: Bundle, store: StoreReader) -> Backend:
    return open_slots(bundle, store, PLENTY)


MAKERS: dict[str, Callable[[Bundle, StoreReader], Backend]] = {
    "slots": slots,
    "sessions": SessionBackend,
    "floats": FloatBackend,
}


@dataclass(frozen=True)
class Opened:
    """A backend, its experts and the width of their rows; how to damage `BROKEN` before it is first read."""

    backend: Backend
    experts: list[ExpertId]
    width: int
    n_slots: int  # that can be made: as many as there are experts, most of which are not in `experts`
    damage: Callable[[], None]
    truth: Callable[[ExpertId, np.ndarray], np.ndarray] | None = None  # y [rows, width]
    untouched: dict[ExpertId, Slot] = field(default_factory=dict[ExpertId, Slot])

    def rows(self, seed: int, rows: int = 3) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal((rows, self.width), dtype=np.float32)

    def alone(self, expert: ExpertId, x: np.ndarray) -> np.ndarray:
        """What a slot gives in which no other expert has been."""
        if expert not in self.untouched:
            self.untouched[expert] = self.slot_for(expert)
            self.untouched[expert].load(expert)
        return self.untouched[expert].run(x).copy()

    def slot_for(self, expert: ExpertId) -> Slot:
        return self.backend.make_slot(self.backend.kind_of(expert))


def damage_record(bundle: Bundle, store: StoreReader) -> None:
    """Flip a byte of `BROKEN`'s record, and of its packed one where there is one."""
    packed = [StoreReader(path, _index(path)) for path in bundle.root.glob(f"packed/*/{STORE}")]
    for reader in (store, *packed):
        with open(reader.path, "r+b") as file:
            file.seek(reader.records[BROKEN].offset)
            (byte,) = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))
    for reader in packed:
        reader.close()


def _index(path: Path) -> str:
    """What a packed store's index is checked by: packing.json is a hash and, below it, an object."""
    _, _, facts = (path.parent / PACKING).read_text().partition("\n")
    return str(json.loads(facts)["index_sha256"])


def pages() -> int:
    """What this process takes, memory that it shares counted once and mapped files left out, in bytes."""
    rollup = Path("/proc/self/smaps_rollup")
    if not rollup.exists():
        return process_bytes()
    found = dict(line.split(":") for line in rollup.read_text().splitlines()[1:])
    return sum(int(found[name].split()[0]) << 10 for name in ("Pss_Anon", "Pss_Shmem"))


def by_matrix(expert: ExpertId, x: np.ndarray) -> np.ndarray:
    """An expert of `runnable`, in float64."""
    seed = 10 + runnable.EXPERTS * expert.layer + expert.expert
    return x.astype(np.float64) @ runnable.weights(seed, runnable.WIDTH, runnable.WIDTH)


@pytest.fixture(params=["twin", "slots", "sessions", "floats", "slots-int4", "sessions-int4"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opened]:
    """Every backend, over float32 experts and, but for `floats`, which has no others, over int4 ones."""
    name, _, scheme = request.param.partition("-")
    if name == "twin":
        twin = TwinBackend(kinds=2)
        yield Opened(twin, EXPERTS, 4, 64, lambda: twin.broken.add(BROKEN), lambda expert, x: x * factor(expert))
        return
    bundle = bundles.write_runnable(tmp_path / "b", n_experts=16) if scheme else runnable.write_bundle(tmp_path / "b")
    with ExitStack() as closing:
        store = closing.enter_context(bundle.open_store())
        backend = MAKERS[name](bundle, store)
        closing.callback(backend.close)
        width = bundle.manifest.model.hidden_size
        yield Opened(
            backend,
            EXPERTS,
            width,
            len(store.records),
            lambda: damage_record(bundle, store),
            None if scheme else by_matrix,
        )
    assert not bundles.scratch_folders(), "something was left in memory"


def test_a_slot_gives_the_expert_that_was_loaded_last(opened: Opened) -> None:
    """Bit for bit what a slot of its own gives, whatever was loaded and run in it before, for one row and many."""
    slots = {kind: opened.backend.make_slot(kind) for kind in map(opened.backend.kind_of, opened.experts)}
    seen = set()
    for round_, expert in enumerate([*opened.experts, *opened.experts[::-1]]):
        slot = slots[opened.backend.kind_of(expert)]
        assert slot.load(expert) > 0
        for rows in (1, 7):
            x = opened.rows(round_, rows)
            y = slot.run(x)
            assert y.shape == x.shape
            assert y.dtype == np.float32
            np.testing.assert_array_equal(y, opened.alone(expert, x))
            if opened.truth:
                np.testing.assert_allclose(y, opened.truth(expert, x), rtol=1e-5, atol=1e-5)
        seen.add(slot.run(opened.rows(99)).tobytes())
    assert len(seen) == len(opened.experts)


def test_slots_do_not_disturb_one_another(opened: Opened) -> None:
    """Each gives its own expert's rows while others load and run beside it, and the bytes read are those of one."""
    mine = [(expert, opened.slot_for(expert)) for expert in opened.experts[:3]]
    wanted = [opened.alone(expert, opened.rows(5)) for expert, _ in mine]
    wrong: list[object] = []

    def work(number: int) -> None:
        expert, slot = mine[number]
        try:
            nbytes = {slot.load(expert) for _ in range(8) if np.array_equal(slot.run(opened.rows(5)), wanted[number])}
            assert len(nbytes) == 1, nbytes
        except BaseException as error:  # noqa: BLE001 - carried to the test
            wrong.append(error)

    for expert, slot in mine:
        slot.load(expert)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(mine))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_damaged_expert_is_refused_by_name_and_harms_no_other(opened: Opened) -> None:
    """Its load raises DamagedFile each time; the slot then takes another expert as if nothing had been."""
    opened.damage()
    slot = opened.slot_for(BROKEN)
    for _ in range(2):
        with pytest.raises(DamagedFile, match=r"experts\.bin.*expert.1"):
            slot.load(BROKEN)
    x = opened.rows(0)
    other = next(
        e for e in opened.experts if e != BROKEN and opened.backend.kind_of(e) == opened.backend.kind_of(BROKEN)
    )
    slot.load(other)
    np.testing.assert_array_equal(slot.run(x), opened.alone(other, x))


def test_what_a_slot_is_said_to_take_is_no_less_than_it_takes(opened: Opened) -> None:
    """Filled slots: the process's memory and what is shared grow by at most `slot_bytes` each."""
    backend = opened.backend
    kinds = [backend.kind_of(expert) for expert in opened.experts]
    for kind in kinds:
        assert 0 <= backend.mapped_bytes(kind) <= backend.slot_bytes(kind)
        assert backend.mapped_bytes(kind) <= backend.available_bytes()
    assert 0 <= backend.making_bytes() <= backend.available_bytes()
    x = opened.rows(0)
    for expert in opened.experts[:2]:  # what the first ones make for all
        opened.alone(expert, x)
    before = process_bytes()
    experts = (opened.experts * opened.n_slots)[: opened.n_slots - 2]
    slots = [opened.slot_for(expert) for expert in experts]
    for slot, expert in zip(slots, experts, strict=True):
        slot.load(expert)
        slot.run(x)
    kinds = [backend.kind_of(expert) for expert in experts]
    taken = process_bytes() - before + sum(map(backend.mapped_bytes, kinds))
    assert taken <= sum(map(backend.slot_bytes, kinds)) + PYTHON_BYTES


def test_a_slot_that_is_closed_gives_its_memory_back(opened: Opened) -> None:
    """Made and closed far more often than there are experts: memory stays, and each slot is as good as the first."""
    backend, x = opened.backend, opened.rows(0)
    wanted = [opened.alone(expert, x) for expert in opened.experts[:2]]
    before = pages()
    for round_ in range(4 * opened.n_slots):
        expert = opened.experts[round_ % 2]
        slot = opened.slot_for(expert)
        slot.load(expert)
        np.testing.assert_array_equal(slot.run(x), wanted[round_ % 2])
        slot.close()
    assert pages() - before <= backend.slot_bytes(backend.kind_of(opened.experts[0])) + 4 * PYTHON_BYTES


def test_closing_twice_is_closing_and_leaves_loaded_slots_usable(opened: Opened) -> None:
    """A reader may still be in a slot when the engine closes."""
    expert, x = opened.experts[0], opened.rows(1)
    wanted = opened.alone(expert, x)
    slot = opened.slot_for(expert)
    slot.load(expert)
    opened.backend.close()
    opened.backend.close()
    np.testing.assert_array_equal(slot.run(x), wanted)


def test_backends_have_names_of_their_own(opened: Opened) -> None:
    """Reports say by the name what ran."""
    assert opened.backend.name in {*MAKERS, "twin"}


@pytest.mark.parametrize("write", [bundles.write_runnable, runnable.write_bundle])
def test_slots_and_sessions_give_the_same_bits(write: Callable[[Path], Bundle], tmp_path: Path) -> None:
    """For every expert and for one row and many: a report's tokens do not depend on what the machine allows."""
    bundle = write(tmp_path / "bundle")
    with bundle.open_store() as store, ExitStack() as closing:
        backends = [slots(bundle, store), SessionBackend(bundle, store)]
        for backend in backends:
            closing.callback(backend.close)
        held = [backend.make_slot(0) for backend in backends]
        for expert in store.records:
            for slot in held:
                slot.load(expert)
            for rows in (1, 2, 9):
                x = np.random.default_rng(rows).standard_normal((rows, bundle.manifest.model.hidden_size))
                results = [slot.run(x.astype(np.float32)).copy() for slot in held]
                np.testing.assert_array_equal(*results)
