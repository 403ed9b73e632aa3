"""A bundle run with plain onnxruntime and numpy, after the format's description, without any of our runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import ExpertId
from tests.export.reference import with_room


def session(model: bytes | str, record: bytes | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if record is not None:
        options.add_external_initializers_from_files_in_memory(["record"], [record], [len(record)])
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_expert(bundle: Bundle, expert: ExpertId, x: np.ndarray) -> np.ndarray:
    """y, float32 [rows, hidden]."""
    with bundle.open_store() as store:
        kind = bundle.manifest.expert_kinds[store.records[expert].kind]
        record = bytes(store.read(expert))
    graph = bundle.path(kind.graph).read_bytes()
    return np.asarray(session(graph, record).run([kind.output], {kind.input: x})[0])


def empty_states(bundle: Bundle) -> dict[str, np.ndarray]:
    return {
        s.input: np.zeros([0 if axis == s.growing_axis else n for axis, n in enumerate(s.shape)], s.dtype)
        for s in bundle.manifest.states
    }


def run(bundle: Bundle, tokens: list[int]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The logits [tokens, vocab] of a text, and the expert ids [tokens, top_k] of each MoE layer."""
    manifest = bundle.manifest
    states = empty_states(bundle)
    values: dict[str, Any] = {s.input: with_room(states[s.input], s, len(tokens)) for s in manifest.states}
    values[manifest.inputs.token_ids] = np.array([tokens], np.int64)
    if manifest.inputs.positions is not None:
        values[manifest.inputs.positions] = np.arange(len(tokens), dtype=np.int64)[None]
    if manifest.inputs.past_length is not None:
        values[manifest.inputs.past_length] = np.zeros(1, np.int64)
    routes = []
    for i, segment in enumerate(manifest.segments):
        feeds = {name: values[name] for name in segment.inputs}
        outputs = session(str(bundle.path(segment.graph))).run(list(segment.outputs), feeds)
        values |= dict(zip(segment.outputs, outputs, strict=True))
        if i == len(manifest.moe_layers):
            break
        layer = manifest.moe_layers[i]
        x, ids, weights = values[layer.x], values[layer.expert_ids], values[layer.expert_weights]
        total = np.zeros_like(x)
        for expert in np.unique(ids):
            rows, places = np.nonzero(ids == expert)
            y = run_expert(bundle, ExpertId(i, int(expert)), x[rows])
            np.add.at(total, rows, y * weights[rows, places][:, None])
        values[layer.output] = total
        routes.append(ids)
    return values[manifest.logits][0], routes


def op_types(bundle: Bundle, graph: str) -> list[str]:
    """The operators of one of a bundle's graphs."""
    return [node.op_type for node in onnx.load(bundle.path(graph), load_external_data=False).graph.node]
