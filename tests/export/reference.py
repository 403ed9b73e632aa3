"""Run a bundle in plain onnxruntime, a few lines per part, without the runtime package."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort

from pocketmoe.bundle.manifest import Segment, State
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import ExpertId


class ReferenceRun:
    """A text being continued: `step` takes token ids and returns their logits, float32 [tokens, vocab]."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.manifest = bundle, bundle.manifest
        self.segments = [_session(bundle.path(s.graph).as_posix()) for s in self.manifest.segments]
        with bundle.open_store() as store:
            self.records = {expert: (store.records[expert].kind, bytes(store.read(expert))) for expert in store.records}
        self._experts: dict[ExpertId, ort.InferenceSession] = {}
        self.past = 0
        self.states = {
            s.output: np.zeros([0 if n == -1 else n for n in s.shape], s.dtype) for s in self.manifest.states
        }
        self.values: dict[str, Any] = {}

    def step(self, tokens: list[int], *, last_row_only: bool = False) -> np.ndarray:
        m, n = self.manifest, len(tokens)
        values = self.values = {m.inputs.token_ids: np.array([tokens], np.int64)}
        if m.inputs.positions:
            values[m.inputs.positions] = np.arange(self.past, self.past + n)[None]
        if m.inputs.past_length:
            values[m.inputs.past_length] = np.array([self.past], np.int64)
        values |= {s.input: with_room(self.states[s.output], s, n) for s in m.states}
        for i, (segment, session) in enumerate(zip(m.segments, self.segments, strict=True)):
            feeds = {name: values[name] for name in segment.inputs}
            if last_row_only and i == len(m.moe_layers):
                feeds = {name: v[-1:] if v.ndim == 2 else v[:, -1:] for name, v in feeds.items()}
            values |= self.run_segment(segment, session, feeds)
            if i < len(m.moe_layers):
                values[m.moe_layers[i].output] = self._experts_sum(i)
        self.states = {s.output: values[s.output] for s in m.states}
        self.past += n
        return values[m.logits][0]

    def run_segment(self, segment: Segment, session: ort.InferenceSession, feeds: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(segment.outputs, session.run(segment.outputs, feeds), strict=True))

    def _experts_sum(self, layer: int) -> np.ndarray:
        moe = self.manifest.moe_layers[layer]
        x, ids, weights = (self.values[name] for name in (moe.x, moe.expert_ids, moe.expert_weights))
        assert (x.dtype, ids.dtype, weights.dtype) == (np.float32, np.int64, np.float32)
        assert ids.shape == weights.shape == (len(x), moe.top_k)
        y = np.zeros_like(x)
        for row in range(len(x)):
            for expert, weight in zip(ids[row], weights[row], strict=True):
                y[row] += weight * self.expert(ExpertId(layer, int(expert)), x[row : row + 1])[0]
        return y

    def expert(self, expert: ExpertId, x: np.ndarray) -> np.ndarray:
        number, record = self.records[expert]
        kind = self.manifest.expert_kinds[number]
        if expert not in self._experts:
            options = _options()
            options.add_external_initializers_from_files_in_memory(["record"], [record], [len(record)])
            self._experts[expert] = ort.InferenceSession(
                self.bundle.path(kind.graph).read_bytes(), options, providers=["CPUExecutionProvider"]
            )
        return np.asarray(self._experts[expert].run([kind.output], {kind.input: x})[0])


def with_room(array: np.ndarray, state: State, tokens: int) -> np.ndarray:
    """A state as its segment wants it for so many new tokens; what the room holds is not zero."""
    if not state.with_room or state.growing_axis is None:
        return array
    shape = [tokens if axis == state.growing_axis else size for axis, size in enumerate(state.shape)]
    return np.concatenate([array, np.full(shape, 7, state.dtype)], axis=state.growing_axis)


class InPlaceRun(ReferenceRun):
    """The same, with each in-place state's past and present in one buffer that is longer than the text."""

    def __init__(self, bundle: Bundle, capacity: int) -> None:
        super().__init__(bundle)
        self.buffers = {}
        for state in self.manifest.states:
            assert state.in_place
            shape = [capacity if n == -1 else n for n in state.shape]
            buffer = ort.OrtValue.ortvalue_from_numpy(np.full(shape, 7, state.dtype))  # what is unfilled is not zero
            self.buffers[state.input] = self.buffers[state.output] = buffer

    def run_segment(self, segment: Segment, session: ort.InferenceSession, feeds: dict[str, Any]) -> dict[str, Any]:
        binding = session.io_binding()
        for name, value in feeds.items():
            if name in self.buffers:
                binding.bind_ortvalue_input(name, self.buffers[name])
            else:
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name in segment.outputs:
            if name in self.buffers:
                binding.bind_ortvalue_output(name, self.buffers[name])
            else:
                binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        return dict(zip(segment.outputs, binding.copy_outputs_to_cpu(), strict=True))


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return options


def _session(graph: str) -> ort.InferenceSession:
    return ort.InferenceSession(graph, _options(), providers=["CPUExecutionProvider"])
