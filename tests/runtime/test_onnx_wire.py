"""Where a saved model keeps its weights, read and changed without the onnx package."""

from __future__ import annotations

import pytest

from pocketmoe.runtime import probe
from pocketmoe.runtime.onnx_wire import external_spans, with_offsets


def test_weights_moved_are_where_they_were_moved_to_and_nothing_else_changes() -> None:
    """By onnx's own reader; long enough numbers that lengths around them take more bytes than before."""
    onnx = pytest.importorskip("onnx")
    model = probe.GRAPH.read_bytes()
    moved = with_offsets(model, lambda offset: f"{offset + 7:0200d}")
    assert [span.offset for span in external_spans(moved)] == [span.offset + 7 for span in external_spans(model)]
    before, after = onnx.load_from_string(model), onnx.load_from_string(moved)
    for old, new in zip(before.graph.initializer, after.graph.initializer, strict=True):
        for entry, changed in zip(old.external_data, new.external_data, strict=True):
            if entry.key == "offset":
                assert changed.value == f"{int(entry.value) + 7:0200d}"
                changed.value = entry.value
    assert before == after
