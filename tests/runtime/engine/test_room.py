"""Caches with room for new tokens hold what caches that each step makes anew hold, whatever is done to a text."""

# pyright: reportArgumentType=false

from __future__ import annotations

import msgspec
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from pocketmoe.bundle.manifest import MANIFEST, read_manifest, seal
from pocketmoe.bundle.reader import Bundle
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.kv_cache import state_bytes
from pocketmoe.runtime.engine.options import EngineOptions
from tests import runnable

CHUNK, CAPACITY = 3, 24


def written_in_place(model: onnx.ModelProto) -> None:
    """The graph's Concat becomes a write into what comes with room."""
    graph = model.graph
    (concat,) = [node for node in graph.node if node.op_type == "Concat"]
    graph.node.remove(concat)
    graph.input.append(runnable.port("past_length", runnable.INT64, 1))
    constants = {"zero": 0, "unit": 1, "columns": [-1, 1], "pads": [0, 2, 0, 0], "flat_new": [-1, runnable.WIDTH]}
    graph.initializer.extend(numpy_helper.from_array(np.array(v, np.int64), name) for name, v in constants.items())
    steps = [
        ("Shape", ["input_ids"], "count", {"start": 1, "end": 2}),
        ("Squeeze", ["count"], "tokens", {}),
        ("Squeeze", ["past_length"], "first", {}),
        ("Add", ["first", "tokens"], "end", {}),
        ("Range", ["first", "end", "unit"], "places", {}),
        ("Reshape", ["places", "columns"], "column", {}),
        ("Pad", ["column", "pads"], "rows", {}),
        ("Reshape", ["new", "flat_new"], "entries", {}),
        ("ScatterND", ["past", "rows", "entries"], "present", {}),
    ]
    graph.node.extend(helper.make_node(op, inputs, [output], **extra) for op, inputs, output, extra in steps)


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    """A bundle that copies its cache, and one that writes into it."""
    folder = tmp_path_factory.mktemp("room")
    copying = runnable.write_bundle(folder / "copying")
    root = runnable.write_bundle(folder / "writing").root
    runnable.change(root, runnable.SEGMENTS[0], written_in_place)
    manifest = read_manifest(root / MANIFEST)
    first = manifest.segments[0]
    changed = msgspec.structs.replace(
        manifest,
        inputs=msgspec.structs.replace(manifest.inputs, past_length="past_length"),
        segments=(msgspec.structs.replace(first, inputs=(*first.inputs, "past_length")), *manifest.segments[1:]),
        states=tuple(msgspec.structs.replace(state, with_room=True) for state in manifest.states),
    )
    (root / MANIFEST).write_bytes(seal(changed))
    return copying, Bundle.open(root)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("feed"), st.integers(1, 7)),
        st.tuples(st.just("back to"), st.integers(0, 12)),
        st.tuples(st.just("fork"), st.integers(0, 12)),
    ),
    min_size=2,
    max_size=7,
)


@settings(max_examples=25, deadline=None)
@given(steps=STEPS)
def test_a_text_goes_on_from_room_as_from_a_copy(roomy: tuple[Bundle, Bundle], steps: list[tuple[str, int]]) -> None:
    """Fed in chunks, taken back, forked: the same logits and the same cache, bit for bit, after every step."""
    options = EngineOptions(capacity=CAPACITY, chunk=CHUNK, backend="sessions", sequences=2)
    with Engine(roomy[0], options) as copying, Engine(roomy[1], options) as writing:
        for step, size in steps:
            found: list[np.ndarray] = []
            for engine in (copying, writing):
                text, other = engine.sequences
                if step == "feed":
                    tokens = [(7 * n + size) % runnable.VOCAB for n in range(min(size, CAPACITY - text.length))]
                    found.append(engine.feed(tokens, "all") if tokens else np.zeros(0))
                elif step == "back to":
                    found.append(np.array(text.truncate(size)))
                else:
                    found.append(np.array(other.fork(text, size)))
                found += [text.state("past").copy(), other.state("past").copy()]
            for one, two in zip(found[:3], found[3:], strict=True):
                assert np.array_equal(one, two)


def test_room_takes_no_copies(roomy: tuple[Bundle, Bundle]) -> None:
    """The plan counts the buffer alone, where a step that copies holds a cache three times."""
    copying, writing = (bundle.manifest.states for bundle in roomy)
    assert state_bytes(writing, CAPACITY) * 3 == state_bytes(copying, CAPACITY)
