"""Runs the graphs between the MoE blocks, values staying in ONNX Runtime from one to the next."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np
import onnxruntime as ort

from pocketmoe.bundle.manifest import MoeLayer, Segment
from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import GraphRefused
from pocketmoe.ort import Session, session_options
from pocketmoe.runtime.engine.cache_routing import BONUS, ROUTED, preferring_segment

Values = dict[str, ort.OrtValue]


class SegmentRunner:
    """One segment's session."""

    def __init__(self, bundle: Bundle, segment: Segment, threads: int, model: bytes | None = None) -> None:
        """`model`: what to load in the place of the segment's graph, with its weights.

        Raises GraphRefused for a graph that ONNX Runtime refuses, OverBudget where memory is short.
        """
        self.segment = segment
        self.graph = bundle.path(segment.graph)
        weights = {"session__model_external_initializers_file_folder_path": str(self.graph.parent)} if model else {}
        self._session = Session(model or str(self.graph), session_options(threads, **weights), self.graph)

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

        Types and fixed sizes were compared when the bundle was opened (`graphs`). Raises GraphRefused.
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


def open_segments(bundle: Bundle, threads: int, preferring: bool) -> list[SegmentRunner]:
    """A runner for each segment; `preferring`: those before MoE layers also take `BONUS` and give `ROUTED`.

    Raises GraphRefused, OverBudget, and BadInput for a layer that cannot prefer experts.
    """
    *routing, last = bundle.manifest.segments
    runners: list[SegmentRunner] = []
    for index, segment in enumerate(routing):
        if preferring:
            names = {"inputs": (*segment.inputs, BONUS), "outputs": (*segment.outputs, ROUTED)}
            model = preferring_segment(bundle, index)
            runners.append(SegmentRunner(bundle, msgspec.structs.replace(segment, **names), threads, model))
        else:
            runners.append(SegmentRunner(bundle, segment, threads))
    return [*runners, SegmentRunner(bundle, last, threads)]


def last_row(value: ort.OrtValue) -> ort.OrtValue:
    """The last token of [tokens, width] or [1, tokens, ...]; anything else unchanged."""
    shape = value.shape()
    if len(shape) == 2:
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value.numpy()[-1:]))
    if len(shape) > 2:
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value.numpy()[:, -1:]))
    return value


def last_uses(segments: list[Segment]) -> list[list[str]]:
    """For each segment the inputs that no later segment takes: they can go when it has run."""
    seen: set[str] = set()
    result: list[list[str]] = []
    for segment in reversed(segments):
        result.append([name for name in segment.inputs if name not in seen])
        seen.update(segment.inputs)
    return result[::-1]
