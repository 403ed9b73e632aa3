"""Runs the graphs between the MoE blocks, values staying in ONNX Runtime from one to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import onnxruntime as ort

from pocketmoe.bundle.manifest import Segment, State
from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import DamagedFile, PocketMoEError
from pocketmoe.runtime.backends.protocol import make_session, session_options
from pocketmoe.runtime.engine.cache_routing import BONUS, ROUTED, preferring_segment

Values = dict[str, ort.OrtValue]

_ONNX_NAMES = {"float32": "float", "float64": "double"}  # where they differ from numpy's


class SegmentRunner:
    """One segment's session."""

    def __init__(self, bundle: Bundle, segment: Segment, threads: int, model: bytes | None = None) -> None:
        """`model`: what to load in the place of the segment's graph, with its weights.

        Raises DamagedFile for a graph that ONNX Runtime refuses, or whose states are not those of the manifest.
        """
        self.segment = segment
        self._path = bundle.path(segment.graph)
        weights = {"session__model_external_initializers_file_folder_path": str(self._path.parent)} if model else {}
        try:
            self._session = make_session(model or str(self._path), session_options(threads, **weights))
        except PocketMoEError:
            raise
        except Exception as error:  # ONNX Runtime's errors have no other base
            raise self._refused(error) from error
        self._check_states(bundle.manifest.states)
        self._binding = self._session.io_binding()

    def run(self, values: Values, shared: Mapping[str, ort.OrtValue]) -> None:
        """Take inputs from `values` and add the outputs; those in `shared` are written to the buffers given there.

        Raises DamagedFile for a graph that cannot be computed.
        """
        binding = self._binding
        for name in self.segment.inputs:
            binding.bind_ortvalue_input(name, values[name])
        for name in self.segment.outputs:
            if name in shared:
                binding.bind_ortvalue_output(name, shared[name])
            else:
                binding.bind_output(name)
        try:
            self._session.run_with_iobinding(binding)
        except RuntimeError as error:  # all that a bound run raises
            raise self._refused(error) from error
        values.update(zip(self.segment.outputs, binding.get_outputs(), strict=True))
        binding.clear_binding_inputs()
        binding.clear_binding_outputs()

    def _check_states(self, states: Sequence[State]) -> None:
        types = {value.name: value.type for value in (*self._session.get_inputs(), *self._session.get_outputs())}
        for state in states:
            wanted = f"tensor({_ONNX_NAMES.get(state.dtype, state.dtype)})"
            for name in (state.input, state.output):
                if types.get(name, wanted) != wanted:
                    raise DamagedFile(self._path, f"has {name!r} as {types[name]}, the manifest as {wanted}")

    def _refused(self, error: Exception) -> DamagedFile:
        return DamagedFile(self._path, f"is refused by ONNX Runtime: {error}")


def open_segments(bundle: Bundle, threads: int, preferring: bool) -> list[SegmentRunner]:
    """A runner for each segment; `preferring`: those before MoE layers also take `BONUS` and give `ROUTED`.

    Raises DamagedFile, and BadInput for a layer that cannot prefer experts.
    """
    *routing, last = bundle.manifest.segments
    runners = []
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
    result = []
    for segment in reversed(segments):
        result.append([name for name in segment.inputs if name not in seen])
        seen.update(segment.inputs)
    return result[::-1]
