"""How fast this runtime computes on this machine: its own kernels, slots and helpers on made-up weights, in some 3 s.

What a class of processors would take is not asked: two processors may be threads of one core, and do not say so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import onnxruntime as ort

from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.store import ExpertId, StoreReader, StoreWriter
from pocketmoe.ort import Rows, Session, session_options
from pocketmoe.profiles.machine.layer_costs import displacer, measure_layer
from pocketmoe.profiles.machine.made_up import (
    INT4,
    INT4_128,
    INT8,
    NF4,
    Form,
    attention_graph,
    chain,
    expert_graph,
    expert_record,
)
from pocketmoe.profiles.machine.pace import Pace
from pocketmoe.profiles.profile import Computing, Products
from pocketmoe.runtime.backends.packing import ExpertGraph, PackedExperts, StoredExperts, pack_into
from pocketmoe.runtime.backends.protocol import Slot
from pocketmoe.runtime.backends.slots import MappedSlot, SlotFile, memory_scratch
from pocketmoe.runtime.engine.affinity import OwnCpu
from pocketmoe.runtime.paging.workers import Workers
from pocketmoe.system.cpus import thread_ids

HIDDEN, WIDTH = 2048, 1024  # OLMoE-1B-7B's
HEADS, HEAD_SIZE, TEXT = 16, 128, 256  # and of attention over so many tokens: 4 MB
CHOSEN = 8  # experts of a layer
EXPERTS = (INT4, INT4_128, INT8, NF4)
DENSE = (INT8, INT4_128)
DISPLACING_BYTES = 64 << 20
FAR, NEAR = (HIDDEN, 3 * HIDDEN, HIDDEN), (HIDDEN // 2,) * 4  # widths of dense products
_EXPERT = ExpertId(0, 0)  # in every slot: what matters is that each has its own memory
_TIMES = 7
LONGEST_S = 0.12  # for each figure


class _Timed(NamedTuple):
    """A median run, in seconds and in works of `Pace`, and the processors that were busy in the mean."""

    seconds: float
    works: float
    busy_cpus: float


class _Found(NamedTuple):
    """`Products` of which near is bytes for each work of `Pace`, whose seconds are not known yet."""

    what: Literal["experts", "dense", "caches"]
    scheme: str
    threads: int
    near: float
    far: float
    busy_cpus: float


def measure_computing(threads: Sequence[int], progress: Progress = no_progress) -> Computing:
    """On each of these numbers of threads. Raises SlotsUnavailable, OSError and what ONNX Runtime refuses."""
    displace, pace = displacer(DISPLACING_BYTES), Pace()
    counts = sorted(set(threads))
    found: list[_Found] = []
    plan = len(EXPERTS) + len(DENSE) + 1
    for done, form in enumerate(EXPERTS):
        progress("computing experts", done, plan)
        found += _experts(form, counts, displace, pace)
    for done, form in enumerate(DENSE, len(EXPERTS)):
        progress("computing dense weights", done, plan)
        found += [_dense(form, count, displace, pace) for count in counts]
    found += [_attention(count, displace, pace) for count in counts]
    progress("running a small model", plan - 1, plan)
    layer = measure_layer(max(counts), displace, pace)
    progress("running a small model", plan, plan)
    products = [
        Products(
            what=each.what,
            scheme=each.scheme,
            threads=each.threads,
            near_bytes_per_s=max(each.near / pace.mean_s, each.far),
            far_bytes_per_s=each.far,
            busy_cpus=min(float(each.threads), each.busy_cpus),
        )
        for each in found
    ]
    return Computing(products=tuple(products), layer=layer, pace_s=pace.mean_s, spread=pace.spread)


def _experts(form: Form, counts: Sequence[int], displace: Callable[[], object], pace: Pace) -> Iterator[_Found]:
    nbytes = CHOSEN * sum(form.nbytes(n, k) for n, k in ((2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)))
    x = np.random.default_rng(0).standard_normal((1, HIDDEN), np.float32)
    with _slots(form) as slots:
        alone = _time(lambda: slots[0].run(x), pace).works * CHOSEN
        one_again = 0.0
        for count in counts:
            with _helpers(count) as workers:
                layer = _Layer(workers, slots, x)
                again, far = _time(layer, pace), _time(layer, pace, displace)
            one_again = one_again or again.works
            # Eight experts are more than the nearest caches hold: the gain by more threads is theirs, the rest one's.
            near = nbytes / (alone * again.works / one_again)
            yield _Found("experts", form.scheme, count, near, nbytes / far.seconds, far.busy_cpus)


@dataclass
class _Layer:
    """A layer's experts, as the pager runs them."""

    workers: Workers
    slots: Sequence[Slot]
    x: np.ndarray

    def __call__(self) -> None:
        self.workers.run(self.slots, self._run)

    def _run(self, slot: Slot) -> None:
        slot.run(self.x)


@contextmanager
def _slots(form: Form) -> Generator[Sequence[Slot]]:
    """The runtime's own slots, each with the made-up expert in it."""
    with memory_scratch() as scratch:
        graph, records = scratch / "expert.onnx", scratch / "records.bin"
        graph.write_bytes(expert_graph(form, HIDDEN, WIDTH))
        with StoreWriter(records) as writer:
            writer.append(_EXPERT, 0, expert_record(form, HIDDEN, WIDTH))
            index = writer.close()
        with StoreReader(records, index) as store:
            experts = StoredExperts((ExpertGraph(graph, "x"),), store, index)
            packed = PackedExperts(scratch, pack_into(scratch, experts, scratch))
        with closing(packed), closing(SlotFile(packed, 0, scratch, CHOSEN)) as file, ExitStack() as slots:
            made = [slots.enter_context(closing(MappedSlot(file))) for _ in range(CHOSEN)]
            for slot in made:
                slot.load(_EXPERT)
            yield made


@contextmanager
def _helpers(threads: int) -> Generator[Workers]:
    """Helpers beside the calling thread, each where a decode step has it."""
    before = thread_ids()
    with closing(Workers(threads - 1)) as workers, OwnCpu(thread_ids() - before if threads > 1 else ()):
        yield workers


def _dense(form: Form, threads: int, displace: Callable[[], object], pace: Pace) -> _Found:
    timed: list[tuple[int, _Timed]] = []
    for widths, before in ((NEAR, None), (FAR, displace)):
        model, nbytes = chain(form, widths)
        x = np.random.default_rng(0).standard_normal((1, widths[0]), np.float32)
        others = thread_ids()
        rows = Rows(Session(model, session_options(threads), "made-up weights"))
        with OwnCpu(thread_ids() - others if threads > 1 else ()):
            timed.append((nbytes, _time(partial(rows.run, x), pace, before)))
    (near_bytes, near), (far_bytes, far) = timed
    return _Found("dense", form.scheme, threads, near_bytes / near.works, far_bytes / far.seconds, far.busy_cpus)


def _attention(threads: int, displace: Callable[[], object], pace: Pace) -> _Found:
    """Keys and values in float32, by one token's attention over a few hundred."""
    session = Session(attention_graph(HEADS, HEAD_SIZE), session_options(threads), "made-up attention")
    rng = np.random.default_rng(0)
    rows = {name: rng.standard_normal((1, 1, HEADS * HEAD_SIZE), np.float32) for name in ("q", "k", "v")}
    caches = {name: rng.standard_normal((1, HEADS, TEXT, HEAD_SIZE), np.float32) for name in ("keys", "values")}
    lengths = {"last": np.array([TEXT - 1], np.int32), "length": np.array(TEXT, np.int32)}
    arrays = {**rows, **caches, **lengths}
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    buffers = {f"{name}_out": values[name] for name in caches}
    run = partial(session.run_values, [*arrays], values, ["y", *buffers], buffers)
    near, far = _time(run, pace), _time(run, pace, displace)
    nbytes = sum(cache.nbytes for cache in caches.values())
    return _Found("caches", "fp32", threads, nbytes / near.works, nbytes / far.seconds, far.busy_cpus)


def _time(run: Callable[[], object], pace: Pace, before: Callable[[], object] | None = None) -> _Timed:
    """A median run, `before` ahead of each, after one that is not counted where there is time for more."""
    took: list[float] = []
    works: list[float] = []
    busy_s = 0.0
    deadline = time.perf_counter() + LONGEST_S
    while not works or (len(works) <= _TIMES and time.perf_counter() < deadline):
        if before is not None:
            before()
        cpu_began, began = time.process_time(), time.perf_counter()
        run()
        took.append(time.perf_counter() - began)
        busy_s += time.process_time() - cpu_began
        works.append(took[-1] / pace())
    middle_s, middle = (statistics.median(each[1:] or each) for each in (took, works))
    return _Timed(middle_s, middle, busy_s / sum(took))
