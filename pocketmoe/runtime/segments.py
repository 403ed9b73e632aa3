"""Runs the graphs between the MoE blocks, values staying in ONNX Runtime from one to the next."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnxruntime as ort

from pocketmoe.bundle import Bundle
from pocketmoe.manifest import Segment
from pocketmoe.runtime.backend import make_session, session_options

Values = dict[str, ort.OrtValue]


class SegmentRunner:
    """One segment's session."""

    def __init__(self, bundle: Bundle, segment: Segment, threads: int) -> None:
        self.segment = segment
        self._session = make_session(str(bundle.path(segment.graph)), session_options(threads))
        self._binding = self._session.io_binding()

    def run(self, values: Values, shared: Mapping[str, ort.OrtValue]) -> None:
        """Take inputs from `values` and add the outputs; those in `shared` are written to the buffers given there."""
        binding = self._binding
        for name in self.segment.inputs:
            binding.bind_ortvalue_input(name, values[name])
        for name in self.segment.outputs:
            if name in shared:
                binding.bind_ortvalue_output(name, shared[name])
            else:
                binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        values.update(zip(self.segment.outputs, binding.get_outputs(), strict=True))
        binding.clear_binding_inputs()
        binding.clear_binding_outputs()


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
