"""Predicts which experts the next layer will want, by running its router on this layer's hidden state.

The state changes little from one layer to the next, so that the next router's choice can be seen one layer ahead
(MoE-Infinity, arXiv 2401.14361; "Speculating Experts", arXiv 2603.19289). Of the top_k experts that are predicted the
half with the highest scores is read, and only while the disk has nothing else to do. Whether that pays depends on disk,
model and budget: it is tried in turns, and left alone where it does not.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from pocketmoe.bundle.manifest import MoeLayer
from pocketmoe.bundle.store import ExpertId
from pocketmoe.errors import GraphRefused
from pocketmoe.ort import Session, session_options
from pocketmoe.runtime.backends.graph_checks import ROUTER_INPUT, ROUTER_OUTPUTS

PrefetchMode = Literal["auto", "on", "off"]


class Trial:
    """Whether something pays, found by doing it in turns: some steps with, some without, then many as was faster."""

    def __init__(self, turn: int = 8, rest: int = 112) -> None:
        """`turn`: steps with, and as many without; `rest`: steps until the next trial."""
        self._turn, self._rest = turn, rest
        self._times: list[float] = []
        self._left = 0
        self.pays = True

    @property
    def on(self) -> bool:
        """Whether to do it in the step that begins."""
        return self.pays if self._left else len(self._times) < self._turn

    def note(self, seconds: float) -> None:
        """How long the step took. Medians are compared: one slow read proves nothing."""
        if self._left:
            self._left -= 1
            return
        self._times.append(seconds)
        if len(self._times) == 2 * self._turn:
            tried, left_out = self._times[: self._turn], self._times[self._turn :]
            self.pays = statistics.median(tried) < statistics.median(left_out)
            self._times, self._left = [], self._rest


@dataclass
class PredictionStats:
    """How often predictions were right, whether or not they were read: int64 [ranks], the likeliest expert first."""

    made: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    right: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def note(self, ranked: Sequence[int], chosen: Sequence[int]) -> None:
        """Compare a prediction, experts by rank, with the router's choice."""
        if len(ranked) > len(self.made):
            more = len(ranked) - len(self.made)
            self.made, self.right = np.pad(self.made, (0, more)), np.pad(self.right, (0, more))
        wanted = set(chosen)
        self.made[: len(ranked)] += 1
        self.right[: len(ranked)] += [expert in wanted for expert in ranked]

    @property
    def precision_by_rank(self) -> list[float]:
        """The share of predictions of each rank that were right; their mean is the recall at top_k."""
        return (self.right / np.maximum(self.made, 1)).round(4).tolist()


class Prefetcher:
    """The routers of all MoE layers but the first, and what they said of the layer to come."""

    def __init__(
        self, layers: Sequence[MoeLayer], routers: Mapping[int, Path], threads: int, mode: PrefetchMode
    ) -> None:
        """`routers`: the graphs of layers whose router is a graph of its own; the others are not predicted.

        `mode` "auto": where it pays. Raises GraphRefused, OverBudget.
        """
        self._layers = layers
        self._mode: PrefetchMode = mode
        self._trial = Trial()
        self._sessions: dict[int, Session] = {}
        self._predicted: tuple[int, list[int]] | None = None  # layer, experts by rank
        self._missed = True
        self.stats = PredictionStats()
        if mode == "off":
            return
        for number, router in routers.items():
            if number:
                self._sessions[number] = Session(str(router), session_options(threads), router)

    @property
    def on(self) -> bool:
        """Whether to predict and prefetch in the step that begins."""
        if self._mode != "auto":
            return self._mode == "on"
        return self._missed and self._trial.on

    def predict(self, layer: int, x: np.ndarray) -> list[ExpertId]:
        """The top_k // 2 experts with the highest router scores in `layer` + 1, as predicted from x, the highest first.

        x: one token's hidden state in `layer`, float32 [1, hidden].
        Raises GraphRefused, OverBudget for a router that cannot be run, or gives something else than it must.
        """
        session = self._sessions.get(layer + 1)
        if session is None:
            return []
        found, weights = session.run(ROUTER_OUTPUTS, {ROUTER_INPUT: x})
        moe = self._layers[layer + 1]
        if found.shape != (1, moe.top_k) or weights.shape != found.shape:
            raise GraphRefused(session.graph, f"gives {list(found.shape)} and {list(weights.shape)} for one token")
        ranked = found[0][np.argsort(-weights[0], kind="stable")].tolist()
        if not 0 <= min(ranked) <= max(ranked) < moe.n_experts:
            raise GraphRefused(session.graph, f"names an expert that is none of {moe.n_experts}")
        self._predicted = (layer + 1, ranked)
        return [ExpertId(layer + 1, expert) for expert in ranked[: max(1, len(ranked) // 2)]]

    def note_choice(self, layer: int, expert_ids: np.ndarray) -> None:
        """What the router of a layer chose, int64 [1, top_k], for the statistics."""
        if self._predicted is not None and self._predicted[0] == layer:
            self.stats.note(self._predicted[1], expert_ids[0].tolist())
        self._predicted = None

    def note_step(self, seconds: float, missed: bool) -> None:
        """A decode step has ended; `missed`: some expert had to be read."""
        if self._missed:
            self._trial.note(seconds)
        self._missed = missed
