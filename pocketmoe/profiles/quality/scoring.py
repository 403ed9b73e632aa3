"""One or two engines over the same windows of text, in lock step: the scores of each token, and what it took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from pocketmoe.bundle.progress import Progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import BadInput, BudgetTooSmall
from pocketmoe.profiles.quality.divergence import (
    Doubles,
    RowScores,
    compare_rows,
    negative_log_likelihood,
    shared_share,
)
from pocketmoe.profiles.quality.models import Model, place_of
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.memory_plan import CHUNK, MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.memory.budget import available_bytes
from pocketmoe.runtime.memory.ceiling import Allowance
from pocketmoe.system.memory import process_bytes

_DEFAULT_SHARE = 0.8  # of the memory that is free, where no budget is given
_NOT_YET_USED = ("expert slots", "activations", "slot scratch")  # claims of an engine that has just been opened


class WindowScores(NamedTuple):
    """The scores of one window's tokens but the first: every sum and quantile of a report comes of these.

    All float64, so that a journal can hold them bit for bit.
    """

    nll: Doubles  # [rows], nats
    reference_nll: Doubles  # [rows], or empty without a reference, as the next two are
    kl: Doubles  # nats
    same_top1: Doubles  # 1 or 0
    shared_experts: Doubles  # [layers], sum over rows of the share in common; empty where it cannot be told
    text_bytes: Doubles  # [1], by the slice's mean bytes per token
    expert_bytes: Doubles  # [engines], of the experts that each row was routed to, summed over rows
    seconds: Doubles  # [engines]


class Scorer:
    """The candidate, and the reference where there is one."""

    def __init__(self, engines: Sequence[Model], step: int = CHUNK) -> None:
        """`step`: tokens fed at a time; 1 has routing depend on what is in memory as it does when decoding."""
        self._engines = engines
        self._step = step
        self._routes: list[list[np.ndarray]] = [[] for _ in engines]  # of the current chunk, by layer
        bundles = [engine.bundle if isinstance(engine, Engine) else None for engine in engines]
        self._expert_bytes = [_expert_bytes(bundle) if bundle else [] for bundle in bundles]
        layers = [[layer.n_experts for layer in bundle.manifest.moe_layers] if bundle else [] for bundle in bundles]
        self._experts_correspond = len(engines) == 2 and layers[0] == layers[1]

    def score(self, tokens: np.ndarray, bytes_per_token: float) -> WindowScores:
        """Score one window, int64 [n], n >= 2. Raises BadInput for logits that are not finite."""
        targets = tokens[1:]
        parts: list[RowScores] = []
        shared: list[np.ndarray] = []
        expert_bytes, seconds = np.zeros(len(self._engines)), np.zeros(len(self._engines))
        for engine in self._engines:
            engine.reset()
        for start in range(0, len(targets), self._step):
            wanted = targets[start : start + self._step]
            logits = self._feed(tokens[start : start + len(wanted)], seconds)
            parts.append(_scores(logits, wanted))
            shared.append(self._shared())
            expert_bytes += [self._routed_bytes(index) for index in range(len(self._engines))]
        nll, reference_nll, kl, same = (np.concatenate(column) for column in zip(*parts, strict=True))
        return WindowScores(
            nll=nll,
            reference_nll=reference_nll,
            kl=kl,
            same_top1=same.astype(np.float64),
            shared_experts=np.sum(shared, axis=0),
            text_bytes=np.array([bytes_per_token * len(targets)]),
            expert_bytes=expert_bytes,
            seconds=seconds,
        )

    def _feed(self, tokens: np.ndarray, seconds: np.ndarray) -> list[np.ndarray]:
        """Logits of every row by each engine, whose time is added to `seconds`."""
        logits: list[np.ndarray] = []
        for index, engine in enumerate(self._engines):
            routes = self._routes[index]
            routes.clear()
            if isinstance(engine, Engine):
                engine.on_routes = lambda _layer, ids, routes=routes: routes.append(ids.copy())
            began = time.perf_counter()
            logits.append(finite(engine, engine.feed(tokens.tolist(), rows="all")))
            seconds[index] += time.perf_counter() - began
            if isinstance(engine, Engine):
                engine.on_routes = None
        return logits

    def _shared(self) -> np.ndarray:
        if not self._experts_correspond:
            return np.empty(0)
        layers = zip(self._routes[1], self._routes[0], strict=True)
        return np.array([shared_share(ours, theirs).sum() for ours, theirs in layers])

    def _routed_bytes(self, index: int) -> int:
        table = self._expert_bytes[index]
        return sum(int(table[layer][ids].sum()) for layer, ids in enumerate(self._routes[index]))


def _scores(logits: Sequence[np.ndarray], targets: np.ndarray) -> RowScores:
    if len(logits) == 2:
        return compare_rows(logits[0], logits[1], targets)
    nothing = np.empty(0)
    return RowScores(negative_log_likelihood(logits[0], targets), nothing, nothing, nothing.astype(bool))


def finite(engine: Model, logits: np.ndarray) -> np.ndarray:
    """`logits`, float32 [rows, vocab], as they are. Minus infinity rules a token out.

    Raises BadInput for a row whose largest logit is NaN or infinite.
    """
    if not np.isfinite(logits.max(axis=1)).all():
        raise BadInput(f"{place_of(engine)}: the model gives logits that are not finite", "Export it again.")
    return logits


def _expert_bytes(bundle: Bundle) -> list[np.ndarray]:
    """What each expert's record takes, int64 [experts], by layer."""
    tables = [np.zeros(layer.n_experts, np.int64) for layer in bundle.manifest.moe_layers]
    with bundle.open_store() as store:
        for expert, record in store.records.items():
            tables[expert.layer][expert.expert] = record.nbytes
    return tables


def open_engines(
    bundles: Sequence[Bundle], options: EngineOptions, progress: Progress, closing: contextlib.ExitStack
) -> list[Engine]:
    """An engine for each bundle, all within one budget: of what is free, each of those yet to come gets the same share.

    Only the first routes by what is in memory where `options` say so.
    Raises BudgetTooSmall, with the least that would do for all as far as it is known by then.
    """
    if options.capped:
        logits = Allowance()
        closing.callback(logits.close)
        logits.set(_logits_bytes(bundles))
    memory = options.memory
    exact = options.exactly()
    if memory.expert_share is not None:
        return [
            closing.enter_context(Engine(bundle, exact if index else options, progress))
            for index, bundle in enumerate(bundles)
        ]
    total = memory.total_bytes or process_bytes() + int(_DEFAULT_SHARE * available_bytes())
    promised = _logits_bytes(bundles)
    engines: list[Engine] = []
    for index, bundle in enumerate(bundles):
        used = process_bytes()
        available = max(0, total - promised - used) // (len(bundles) - index)
        mine = replace(exact if index else options, memory=MemoryRequest(total_bytes=used + available))
        try:
            engine = closing.enter_context(Engine(bundle, mine, progress))
        except BudgetTooSmall as error:
            least = used + promised + (error.least_bytes - used) * (len(bundles) - index)
            raise BudgetTooSmall(total, least) from error
        promised += sum(engine.budget.claims.get(name, 0) for name in _NOT_YET_USED)
        engines.append(engine)
    return engines


def _logits_bytes(bundles: Sequence[Bundle]) -> int:
    """Logits of one chunk for every bundle: as the graph gives them, while they are joined, and the largest copies."""
    return 4 * CHUNK * (2 + len(bundles)) * bundles[0].manifest.model.vocab_size + (48 << 20)
