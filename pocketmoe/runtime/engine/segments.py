"""Runs the graphs between the MoE blocks, values staying in ONNX Runtime from one to the next."""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import onnxruntime as ort

from pocketmoe.bundle.manifest import Model, MoeLayer, Segment, State
from pocketmoe.errors import GraphRefused
from pocketmoe.ort import Session, session_options
from pocketmoe.runtime.engine.cache_routing import BONUS, ROUTED
from pocketmoe.runtime.engine.sequence import Sequence, Values

Rows = Literal["last", "all", "none"]
SegmentObserver = Callable[[Values], None]  # called with the values that there are after a segment


class SegmentRunner:
    """One segment's session."""

    def __init__(self, segment: Segment, graph: Path, threads: int, model: bytes | None = None) -> None:
        """`model`: what to load in the place of the segment's graph, with its weights.

        Raises GraphRefused for a graph that ONNX Runtime refuses, OverBudget where memory is short.
        """
        self.segment = segment
        self.graph = graph
        weights = {"session__model_external_initializers_file_folder_path": str(graph.parent)} if model else {}
        self._session = Session(model or str(graph), session_options(threads, **weights), graph)

    def run(self, values: Values, shared: Mapping[str, ort.OrtValue]) -> None:
        """Take inputs from `values` and add the outputs; those in `shared` are written to the buffers given there.

        Raises GraphRefused for a graph that cannot be computed, OverBudget where memory is short.
        """
        segment = self.segment
        found = self._session.run_values(segment.inputs, values, segment.outputs, shared)
        values.update(zip(segment.outputs, found, strict=True))

    def check_routes(
        self, layer: MoeLayer, tokens: int, x: np.ndarray, expert_ids: np.ndarray, expert_weights: np.ndarray
    ) -> None:
        """What a chunk of tokens brings to an MoE layer has the shapes that it must, and names experts that there are.

        x: float32 [tokens, width]; expert_ids: int64, expert_weights: float32, both [tokens, top_k]. Types and fixed
        sizes were compared when the bundle was opened (`graph_checks`). Raises GraphRefused.
        """
        if len(x) != tokens or expert_ids.shape != (tokens, layer.top_k) or expert_weights.shape != expert_ids.shape:
            shapes = ", ".join(str(list(value.shape)) for value in (x, expert_ids, expert_weights))
            raise GraphRefused(self.graph, f"gives {tokens} tokens' states, experts and weights as {shapes}")
        if tokens == 1:  # quicker than two reductions, and each token pays for it in every layer
            chosen = expert_ids[0].tolist()
            least, most = min(chosen), max(chosen)
        else:
            least, most = int(expert_ids.min()), int(expert_ids.max())
        if least < 0 or most >= layer.n_experts:
            raise GraphRefused(self.graph, f"names expert {most if least >= 0 else least} of {layer.n_experts}")


class Segments:
    """All segments in their order, through which the chunks of any text go."""

    def __init__(
        self,
        runners: abc.Sequence[SegmentRunner],
        layers: abc.Sequence[MoeLayer],
        states: abc.Sequence[State],
        logits: str,
        model: Model,
    ) -> None:
        """`states`: those of each text. `logits`: what the last segment calls them."""
        self.seconds = 0.0  # in which segments ran
        self._runners = runners
        segments = [runner.segment for runner in runners]
        self._dead_after, self._for_experts = last_uses(segments), routed_alone(segments, layers)
        self._logits, self._vocab_size = logits, model.vocab_size
        self._head_by_row = not any(spec.output in runners[-1].segment.outputs for spec in states)

    def run(self, index: int, values: Values, sequence: Sequence, observer: SegmentObserver | None) -> None:
        """Run a segment on the `values` of a chunk of a text: they gain its outputs and lose what no later one takes.

        Raises GraphRefused, DamagedFile, OverBudget.
        """
        began = time.perf_counter()
        runner, states = self._runners[index], sequence.states
        states.provide(values, runner.segment.inputs)
        runner.run(values, states.targets(values))
        sequence.advance(values, runner.segment.outputs)
        if observer:
            observer(values)
        for name in self._dead_after[index]:
            del values[name]
        self.seconds += time.perf_counter() - began

    def forget_routed(self, index: int, values: Values) -> None:
        """The experts after a segment have run: `values` lose what was for them alone.

        Of a chunk of 128 tokens that is a megabyte in each of Qwen3-30B-A3B's 48 layers.
        """
        for name in self._for_experts[index]:
            values.pop(name, None)

    def check_routes(
        self, index: int, layer: MoeLayer, tokens: int, x: np.ndarray, expert_ids: np.ndarray, weights: np.ndarray
    ) -> None:
        """See `SegmentRunner`: x float32 [tokens, width], expert_ids and weights [tokens, top_k]."""
        self._runners[index].check_routes(layer, tokens, x, expert_ids, weights)

    def logits(
        self, values: Values, tokens: int, sequence: Sequence, rows: Rows, observer: SegmentObserver | None
    ) -> np.ndarray:
        """Run the last segment, on as few rows as are wanted where it treats each row by itself.

        Returns float32 [rows, vocab]. Raises GraphRefused, OverBudget.
        """
        last = len(self._runners) - 1
        if rows == "none" and self._head_by_row:
            return np.empty((0, self._vocab_size), np.float32)
        if rows == "last" and self._head_by_row:
            for name in self._runners[last].segment.inputs:
                values[name] = last_row(values[name])
            tokens = 1
        self.run(last, values, sequence, observer)
        logits = values[self._logits].numpy()
        if logits.shape != (1, tokens, self._vocab_size):
            raise GraphRefused(self._runners[last].graph, f"gives logits {list(logits.shape)} for {tokens} tokens")
        return {"all": logits[0], "last": logits[0, -1:], "none": logits[0, :0]}[rows]


def open_segments(
    segments: abc.Sequence[Segment], graphs: abc.Sequence[Path], threads: int, models: abc.Sequence[bytes] = ()
) -> list[SegmentRunner]:
    """A runner for each segment. `models`: what takes the place of the graphs before MoE layers, all or none of them;
    they also take `BONUS` and give `ROUTED`.

    Raises GraphRefused, OverBudget.
    """
    runners: list[SegmentRunner] = []
    for index, (segment, graph) in enumerate(zip(segments, graphs, strict=True)):
        model = models[index] if index < len(models) else None
        names = {"inputs": (*segment.inputs, BONUS), "outputs": (*segment.outputs, ROUTED)} if model else {}
        runners.append(SegmentRunner(msgspec.structs.replace(segment, **names), graph, threads, model))
    return runners


def last_row(value: ort.OrtValue) -> ort.OrtValue:
    """The last token of [tokens, width] or [1, tokens, ...]; anything else unchanged.

    A copy, since ONNX Runtime's memory may go with `value`, whatever arrays look into it.
    """
    shape = value.shape()
    if len(shape) < 2 or shape[-2 if len(shape) == 2 else 1] == 1:
        return value
    last = value.numpy()[-1:] if len(shape) == 2 else value.numpy()[:, -1:]
    return ort.OrtValue.ortvalue_from_numpy(last.copy())


def routed_alone(segments: abc.Sequence[Segment], layers: abc.Sequence[MoeLayer]) -> list[list[str]]:
    """For each segment but the last what only the layer after it takes of all that there is: neither a later segment
    nor a later layer, which may have the same weights (Llama-4's are ones).
    """
    later: set[str] = set(segments[-1].inputs)
    result: list[list[str]] = []
    for segment, layer in zip(segments[-2::-1], reversed(layers), strict=True):
        names = (layer.x, layer.expert_ids, layer.expert_weights)
        result.append([name for name in names if name not in later])
        later.update(names, segment.inputs)
    return result[::-1]


def last_uses(segments: abc.Sequence[Segment]) -> list[list[str]]:
    """For each segment the inputs that no later segment takes: they can go when it has run."""
    seen: set[str] = set()
    result: list[list[str]] = []
    for segment in reversed(segments):
        result.append([name for name in segment.inputs if name not in seen])
        seen.update(segment.inputs)
    return result[::-1]
