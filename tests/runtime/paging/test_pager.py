"""The pager against an in-memory twin of a backend whose slots notice when they are swapped while they run."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketmoe.bundle.store import ExpertId
from pocketmoe.errors import DamagedFile
from pocketmoe.runtime.memory.budget import Budget
from pocketmoe.runtime.paging.cache import ExpertCache
from pocketmoe.runtime.paging.pager import Pager, Pool, Routed
from tests.hang import HANG_S
from tests.twin import SLOT_BYTES, TwinBackend, factor

HIDDEN = 4


def make_pager(
    backend: TwinBackend, layers: int, experts: int, slots: int, threads: int, cache: type[ExpertCache] = ExpertCache
) -> Pager:
    pools = {}
    for kind in range(backend.kinds):
        of_kind = len(range(kind, experts, backend.kinds))
        policy = cache(slots, dict.fromkeys(range(layers), of_kind), experts)
        pools[kind] = Pool(backend, kind, policy, Budget(0))
    return Pager(backend, pools, (layers, experts), threads)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_slots_any_threads_same_results(data: st.DataObject) -> None:
    """Each token gets its own experts' outputs, at any number of slots, threads and kinds; none is swapped in use.

    Nor closed in use, where their number changes on the way; those that go are handed out once.
    """
    layers, experts = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 9))
    top_k = data.draw(st.integers(1, min(experts, 4)))
    slots, threads = data.draw(st.integers(1, layers * experts + 2)), data.draw(st.integers(1, 3))
    backend = TwinBackend(kinds=data.draw(st.integers(1, 2)), read_s=data.draw(st.sampled_from([0.0, 0.0003])))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    pager = make_pager(backend, layers, experts, slots, threads)
    at_most: dict[int, int] = {}
    try:
        for _ in range(4):
            for kind in range(backend.kinds):
                at_most[kind] = data.draw(st.integers(1, layers * experts + 2))
                for slot in pager.resize({kind: at_most[kind]})[kind]:
                    slot.close()
            assert backend.made - backend.closed <= sum(at_most.values())
            for layer in range(layers):
                chunks = [routed(rng, experts, top_k) for _ in range(int(rng.integers(1, 4)))]
                likely = [ExpertId((layer + 1) % layers, int(e)) for e in rng.permutation(experts)[:3]]
                predict_next = (lambda likely=likely: likely) if rng.integers(2) else None
                results = pager.run_layer(layer, chunks, predict_next)
                for chunk, parts in zip(chunks, results, strict=True):
                    factors = np.vectorize(lambda e, layer=layer: factor(ExpertId(layer, e)))(chunk.expert_ids)
                    assert np.array_equal(parts, chunk.x[:, None] * factors.astype(np.float32)[:, :, None])
        stats = pager.stats
        assert stats.hits + stats.prefetch_hits + stats.misses > 0
    finally:
        pager.close()
    assert stats.bytes_read == SLOT_BYTES * (stats.misses + stats.prefetches)
    assert stats.bytes_prefetched == SLOT_BYTES * stats.prefetches
    assert stats.prefetch_hits <= stats.prefetches


def routed(rng: np.random.Generator, experts: int, top_k: int) -> Routed:
    tokens = int(rng.integers(1, 6))
    ids = np.stack([rng.choice(experts, top_k, replace=False) for _ in range(tokens)])
    return Routed(rng.standard_normal((tokens, HIDDEN), dtype=np.float32), ids)


def run_one(pager: Pager, layer: int, x: np.ndarray, expert_ids: np.ndarray) -> np.ndarray:
    (parts,) = pager.run_layer(layer, [Routed(x, expert_ids)])
    return parts


def test_a_prefetch_is_read_in_time_and_takes_nobodys_place() -> None:
    """What a prefetch reads is there when it is wanted; it never evicts what the layer wants or another prefetch."""
    backend, begun = TwinBackend(), threading.Semaphore(0)
    pager = make_pager(backend, layers=2, experts=6, slots=4, threads=1)
    x = np.ones((1, HIDDEN), np.float32)
    backend.on_load = lambda expert: expert.layer and begun.release()
    try:
        pager.run_layer(0, [Routed(x, np.array([[0, 1]]))], lambda: [ExpertId(1, e) for e in (2, 3, 4)])
        for _ in range(2):  # the third may have the place of an expert of layer 0 that has run
            assert begun.acquire(timeout=HANG_S)
        assert np.array_equal(run_one(pager, 1, x, np.array([[3, 2]]))[0, :, 0], np.array([104, 103], np.float32))
        assert (pager.stats.misses, pager.stats.prefetch_hits) == (2, 2)
    finally:
        pager.close()


def test_no_prefetch_is_read_beside_what_a_layer_waits_for() -> None:
    """A prediction's reads begin when the layer's own have ended; what was predicted for that layer is forgotten."""
    backend, order = TwinBackend(), list[ExpertId]()
    prefetching, run = threading.Event(), threading.Event()
    pager = make_pager(backend, layers=3, experts=6, slots=12, threads=1)
    x = np.ones((1, HIDDEN), np.float32)

    def load(expert: ExpertId) -> None:
        order.append(expert)
        if expert.layer == 2:
            prefetching.set()
        elif expert.expert < 2:
            assert not prefetching.wait(0.2), "a prefetch has begun"
        else:
            assert run.wait(HANG_S)  # and no other prefetch begins meanwhile

    backend.on_load = load
    try:
        pager.run_layer(0, [Routed(x, np.array([[0]]))], lambda: [ExpertId(1, e) for e in (0, 4, 5)])
        pager.run_layer(1, [Routed(x, np.array([[0, 1]]))], lambda: [ExpertId(2, 3)])
        run.set()
        assert prefetching.wait(HANG_S)
    finally:
        pager.close()
    assert order[:2] == [ExpertId(0, 0), ExpertId(1, 0)]
    assert ExpertId(1, 5) not in order


@pytest.mark.parametrize("threads", [1, 2])
def test_a_broken_expert_is_an_error_and_not_a_hang(threads: int) -> None:
    """An expert that cannot be read raises its error in the caller; the next layer still runs, and so does a retry."""
    backend = TwinBackend(read_s=0.0005)
    backend.broken.add(ExpertId(0, 3))
    pager = make_pager(backend, layers=2, experts=8, slots=4, threads=threads)
    x = np.ones((1, HIDDEN), np.float32)
    try:
        with pytest.raises(DamagedFile, match="expert=3"):
            run_one(pager, 0, x, np.array([[1, 2, 3, 4, 5]]))
        assert np.array_equal(run_one(pager, 1, x, np.array([[3]]))[0, 0], x[0] * np.float32(104))
        backend.broken.clear()
        assert np.array_equal(run_one(pager, 0, x, np.array([[3]]))[0, 0], x[0] * np.float32(4))
    finally:
        pager.close()


def test_what_is_resident_computes_while_the_rest_is_read() -> None:
    """A resident expert is run before the layer's missing ones have arrived: each waits here for the other."""
    backend = TwinBackend()
    pager = make_pager(backend, layers=1, experts=2, slots=2, threads=1)
    x = np.ones((1, HIDDEN), np.float32)
    running, reading = threading.Event(), threading.Event()

    def load(expert: ExpertId) -> None:
        reading.set()
        assert running.wait(HANG_S)

    def run() -> None:
        running.set()
        assert reading.wait(HANG_S)

    try:
        run_one(pager, 0, x, np.array([[0]]))
        backend.on_load, backend.on_run = load, run
        assert np.array_equal(run_one(pager, 0, x, np.array([[0, 1]]))[0, :, 0], np.array([1, 2], np.float32))
    finally:
        pager.close()


def test_a_reader_that_dies_is_an_error_and_not_a_hang() -> None:
    """A bug in what a reader calls reaches the caller, at once and at every later layer."""

    class Buggy(ExpertCache):
        def forget(self, expert: ExpertId) -> None:
            assert expert not in backend.broken, "a bug"
            super().forget(expert)

    backend = TwinBackend()
    backend.broken.add(ExpertId(0, 3))
    pager = make_pager(backend, layers=1, experts=4, slots=2, threads=1, cache=Buggy)
    x = np.ones((1, HIDDEN), np.float32)
    try:
        for experts in ([3], [0, 1, 2]):
            with pytest.raises(AssertionError, match="a bug"):
                run_one(pager, 0, x, np.array([experts]))
    finally:
        pager.close()
