"""What one process of a profile does: look at a bundle, or run the workload once within a budget.

The command line's hidden `measure` is the process; an order comes in, a record goes out.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import msgspec
import numpy as np

from pocketmoe.bundle.files import read_text
from pocketmoe.bundle.manifest import Manifest
from pocketmoe.bundle.packed import PackedPlace
from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import ExpertId
from pocketmoe.errors import BadInput, BudgetTooSmall, printable
from pocketmoe.profiles.machine.energy import EnergyMeter
from pocketmoe.profiles.machine.load import LoadMeter, OthersLoad
from pocketmoe.profiles.machine.pace import Pace
from pocketmoe.profiles.machine.thermal import ThermalWatch
from pocketmoe.profiles.measure.expert_costs import expert_costs
from pocketmoe.profiles.profile import (
    Energy,
    ExpertCosts,
    Memory,
    Model,
    Record,
    Run,
    Step,
    StoredKind,
    Thermal,
    Workload,
)
from pocketmoe.runtime.backends.choice import BackendName
from pocketmoe.runtime.engine.claims import open_budget
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.memory_plan import Load, MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.generate import StepShares
from pocketmoe.runtime.paging.pager import PagerStats
from pocketmoe.runtime.paging.prefetch import PrefetchMode
from pocketmoe.runtime.run import default_threads
from pocketmoe.runtime.sampling import Sampling, make_sampler
from pocketmoe.runtime.tokenizer import Text
from pocketmoe.runtime.trace import describe
from pocketmoe.system.memory import major_faults

_LOOKS_S = 0.25  # between looks at sensors


class Order(Record, frozen=True, kw_only=True):
    """What to do. Neither `memory_bytes` nor `expert_share`: a survey. `text` "": seeded tokens."""

    bundle: str
    text: str = ""
    seed: int = 0
    prompt_tokens: int
    output_tokens: int
    threads: int | None = None
    backend: str = "auto"
    prefetch: str = "auto"
    memory_bytes: int | None = None
    expert_share: float | None = None
    read_bytes_per_s: float | None = None
    want_routes: bool = False
    packed_dir: str = ""  # and whether it is for every bundle
    packed_always: bool = False

    def open(self) -> Bundle:
        """The bundle. Raises BadInput or DamagedFile."""
        place = PackedPlace(Path(self.packed_dir), self.packed_always) if self.packed_dir else None
        return Bundle.open(Path(self.bundle), place)


class Survey(Record, frozen=True, kw_only=True):
    """What is to be known before there is a budget."""

    model: Model
    memory: Memory
    workload: Workload
    expert: ExpertCosts
    threads: int


class Measured(Record, frozen=True, kw_only=True):
    """A run; where wanted its routing, int16 [tokens, layers, top_k], -1 for none, and how the prompt was cut up."""

    run: Run
    routes: bytes = b""
    prompt_walks: tuple[int, ...] = ()


def survey(order: Order, progress: Progress = no_progress) -> Survey:
    """Look at a bundle without a budget; pack it for this machine where that has not been done.

    Raises BadInput or DamagedFile.
    """
    bundle = order.open()
    prompt = prompt_ids(bundle, order)
    load = Load.of_text(order.prompt_tokens + order.output_tokens)
    least = 0
    try:
        open_budget(MemoryRequest(total_bytes=1), bundle.manifest, load)
    except BudgetTooSmall as refusal:
        least = refusal.least_bytes
    options = replace(_options(order, len(prompt)), memory=MemoryRequest(expert_share=1.0))
    with Engine(bundle, options, progress) as engine:
        expert, read_bytes = expert_costs(engine, progress)
        info = describe(engine)
        slots = sum(pool.slots for pool in info.pools)
        slot_bytes = sum(pool.slots * pool.slot_bytes for pool in info.pools) // slots
    workload = Workload(
        source="text" if order.text else "seeded tokens",
        text=printable(Path(order.text).name),
        seed=order.seed,
        prompt_tokens=len(prompt),
        output_tokens=order.output_tokens,
        prompt_sha256=_hash_of(prompt),
    )
    return Survey(
        model=_model(bundle, read_bytes, slot_bytes),
        memory=Memory(fixed_bytes=info.fixed_bytes, loading_bytes=info.loading_bytes, least_bytes=least),
        workload=workload,
        expert=expert,
        threads=options.threads,
    )


def measure(order: Order, progress: Progress = no_progress) -> Measured:
    """Run the workload within the budget. Raises BudgetTooSmall, BadInput or DamagedFile."""
    began = time.perf_counter()
    bundle = order.open()
    prompt = prompt_ids(bundle, order)
    options = replace(_options(order, len(prompt)), memory=MemoryRequest(order.memory_bytes, order.expert_share))
    with Engine(bundle, options, progress) as engine:
        recorder = _Recorder(bundle.manifest, len(prompt))
        if order.want_routes:
            engine.on_routes = recorder
        start_s = time.perf_counter() - began
        run = _run(engine, prompt, order, start_s, progress)
    run = msgspec.structs.replace(run, threads=options.threads)
    routes = recorder.ids.tobytes() if order.want_routes else b""
    return Measured(run=run, routes=routes, prompt_walks=tuple(recorder.prompt_walks))


def prompt_ids(bundle: Bundle, order: Order) -> list[int]:
    """The workload's prompt: the first tokens of a text, or tokens drawn evenly from the vocabulary by the seed.

    Raises BadInput for a text that is too short or cannot be read, or lengths beyond the model's context.
    """
    model = bundle.manifest.model
    total = order.prompt_tokens + order.output_tokens
    if total > model.context_length:
        raise BadInput(
            f"{total} tokens do not fit the model's context of {model.context_length}",
            "Ask for fewer: --prompt-tokens, --output-tokens.",
        )
    if not order.text:
        ordinary = np.setdiff1d(np.arange(model.vocab_size), np.asarray(model.eos_token_ids, np.int64))
        return np.random.default_rng(order.seed).choice(ordinary, order.prompt_tokens).tolist()
    text = read_text(Path(order.text), "Name a text file.")
    ids = Text(bundle).encode(text)
    if len(ids) < order.prompt_tokens:
        raise BadInput(
            f"{order.text} has {len(ids)} tokens, the prompt is to have {order.prompt_tokens}",
            "Give a longer text, or --prompt-tokens.",
        )
    return ids[: order.prompt_tokens]


def _options(order: Order, prompt_tokens: int) -> EngineOptions:
    return EngineOptions(
        capacity=prompt_tokens + order.output_tokens,
        threads=order.threads or default_threads(),
        backend=cast(BackendName, order.backend),
        prefetch=cast(PrefetchMode, order.prefetch),
        read_bytes_per_s=order.read_bytes_per_s,
        capped=True,
    )


@dataclass(frozen=True)
class _Decoded:
    """An answer, and what was seen while it was made. `before`: statistics of when the prompt had been read."""

    tokens: list[int]
    steps_s: list[float]
    ttft_s: float
    before: PagerStats
    major_faults: int
    energy: Energy
    thermal: Thermal
    load: OthersLoad
    pace_s: float


def _decode(engine: Engine, prompt: Sequence[int], order: Order, progress: Progress) -> _Decoded:
    """Prompt and answer, timed. The answer is sampled, since greedy text of an untrained model runs in circles."""
    sampler = make_sampler(Sampling(1.0, 1.0, order.seed))
    thermal, pace = ThermalWatch(), Pace()
    began = time.perf_counter()
    logits = engine.feed(prompt)[-1]
    ttft_s = time.perf_counter() - began
    before, faults, energy, others = replace(engine.stats), major_faults(), EnergyMeter(), LoadMeter()
    tokens, looked = [sampler(logits)], time.perf_counter()
    steps: list[float] = []
    for done in range(order.output_tokens - 1):
        began = time.perf_counter()
        logits = engine.feed(tokens[-1:])[-1]
        steps.append(time.perf_counter() - began)
        pace()
        tokens.append(sampler(logits))
        if began - looked > _LOOKS_S:
            looked = began
            energy.sample()
            thermal.sample()
            progress("decoding", done, order.output_tokens - 1)
    engine.budget.observe()
    return _Decoded(
        tokens,
        steps,
        ttft_s,
        before,
        major_faults() - faults,
        energy.report(len(steps)),
        thermal.report(),
        others.load(),
        pace.median_s,
    )


def _run(engine: Engine, prompt: Sequence[int], order: Order, start_s: float, progress: Progress) -> Run:
    """The workload once, as a record; of what only the parent knows, nothing."""
    done = _decode(engine, prompt, order, progress)
    stats, opened, before, n_steps = replace(engine.stats), engine.opened, done.before, len(done.steps_s)
    misses, hits, prefetched = (getattr(stats, n) - getattr(before, n) for n in ("misses", "hits", "prefetch_hits"))
    loads, wanted = misses + stats.prefetches - before.prefetches, hits + prefetched + misses
    slots, peak_bytes, step = sum(opened.slots.values()), engine.budget.peak_bytes, _step(engine)
    costs, _ = expert_costs(engine)  # last, since the slots hold anything afterwards
    median_s, mean_s = float(np.median(done.steps_s)), sum(done.steps_s) / n_steps
    return Run(
        memory="",
        memory_budget_bytes=engine.budget.total_bytes,
        read_bytes_per_s=order.read_bytes_per_s,
        limited_by="process",
        peak_memory_bytes=peak_bytes,
        expert_slots=slots,
        expert_share=slots / sum(opened.experts.values()),
        start_s=start_s,
        ttft_s=done.ttft_s,
        prefill_tokens_per_s=len(prompt) / done.ttft_s,
        # A quota stops a few steps for long: their median would be the speed without it.
        decode_tokens_per_s=1 / (mean_s if done.load.is_throttled else median_s),
        mean_tokens_per_s=1 / mean_s,
        step_median_s=median_s,
        step_p95_s=float(np.percentile(done.steps_s, 95)),
        step=step,
        hit_rate=hits / wanted,
        prefetch_hit_rate=prefetched / wanted,
        misses_per_token=misses / n_steps,
        prompt_reads=before.misses,
        bytes_read=stats.bytes_read,
        bytes_read_per_token=(stats.bytes_read - before.bytes_read) / n_steps,
        bytes_prefetched=stats.bytes_prefetched,
        prefetch_precision=float(engine.predictions.right.sum() / max(1, engine.predictions.made.sum())),
        load_s=(stats.load_s - before.load_s) / loads if loads else 0.0,
        read_one_s=costs.read_one_s,
        read_more_s=costs.read_more_s,
        major_faults=done.major_faults,
        energy=done.energy,
        thermal=done.thermal,
        tokens_sha256=_hash_of(done.tokens),
        backend=opened.backend,
        backend_reason=printable(opened.backend_reason),
        threads=1,
        others_cpu=done.load.others_cpu,
        throttled=done.load.throttled,
        others_disk_bytes_per_s=done.load.disk_bytes_per_s,
        loaded=done.load.is_busy,
        pace_s=done.pace_s,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _step(engine: Engine) -> Step:
    shares = StepShares.of(engine.times)
    assert shares is not None, "an answer has two tokens at least"
    return Step(
        mean_s=shares.mean_s,
        segments=shares.segments,
        experts=shares.experts,
        waiting=shares.waiting,
        python=shares.python,
    )


class _Recorder:
    """Takes the routes of a run as they come; see `TraceWriter`, which puts them into a file."""

    def __init__(self, manifest: Manifest, prompt_tokens: int) -> None:
        layers = manifest.moe_layers
        self._shape = (len(layers), max(layer.top_k for layer in layers))
        self._walk: list[list[np.ndarray]] = [[] for _ in layers]
        self._walks: list[np.ndarray] = []
        self._prompt_left = prompt_tokens
        self.prompt_walks: list[int] = []

    def __call__(self, layer: int, expert_ids: np.ndarray) -> None:
        self._walk[layer].append(expert_ids.astype(np.int16))
        if layer == self._shape[0] - 1 and len(self._walk[layer]) == len(self._walk[0]):
            chosen = [np.concatenate(chunks) for chunks in self._walk]
            ids = np.full((len(chosen[0]), *self._shape), -1, np.int16)
            for number, found in enumerate(chosen):
                ids[:, number, : found.shape[1]] = found
                self._walk[number].clear()
            self._walks.append(ids)
            if self._prompt_left > 0:
                self.prompt_walks.append(len(ids))
                self._prompt_left -= len(ids)

    @property
    def ids(self) -> np.ndarray:
        """int16 [tokens, layers, top_k], -1 for none."""
        return np.concatenate(self._walks)


def _model(bundle: Bundle, read_bytes: int, slot_bytes: int) -> Model:
    manifest = bundle.manifest
    tied = not any(tensor.role == "head" for tensor in manifest.dense)
    states = [state for state in manifest.states if state.growing_axis is not None]
    return Model(
        name=printable(bundle.name),
        bundle_sha256=manifest.sha256,
        source=printable(manifest.provenance.source),
        architecture=manifest.model.architecture,
        parameters=manifest.model.n_parameters,
        context_length=manifest.model.context_length,
        experts=tuple(layer.n_experts for layer in manifest.moe_layers),
        experts_per_token=tuple(layer.top_k for layer in manifest.moe_layers),
        expert_read_bytes=read_bytes,
        expert_slot_bytes=slot_bytes,
        dense_bytes=sum(tensor.nbytes for tensor in manifest.dense if tied or tensor.role != "embedding"),
        head_bytes=sum(tensor.nbytes for tensor in manifest.dense if tensor.role == ("embedding" if tied else "head")),
        state_bytes_per_token=sum(
            math.prod(abs(size) for size in state.shape) * np.dtype(state.dtype).itemsize for state in states
        ),
        schemes=_schemes(manifest),
        expert_kinds=tuple(StoredKind(scheme=kind.scheme, nbytes=kind.nbytes) for kind in manifest.expert_kinds),
        expert_kind_of=_kind_of(bundle),
    )


def _kind_of(bundle: Bundle) -> tuple[tuple[int, ...], ...]:
    with bundle.open_store() as store:
        return tuple(
            tuple(store.records[ExpertId(index, expert)].kind for expert in range(layer.n_experts))
            for index, layer in enumerate(bundle.manifest.moe_layers)
        )


def _schemes(manifest: Manifest) -> dict[str, str]:
    found: dict[str, set[str]] = {"experts": {kind.scheme for kind in manifest.expert_kinds}}
    for tensor in manifest.dense:
        found.setdefault(tensor.role, set()).add(tensor.scheme)
    return {what: ", ".join(sorted(schemes)) for what, schemes in found.items()}


def _hash_of(tokens: Sequence[int]) -> str:
    return hashlib.sha256(np.asarray(tokens, np.int64).tobytes()).hexdigest()
