"""What goes from segment to segment: the last row alone to the head, and nothing longer than it is needed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime as ort
import pytest

from pocketmoe.bundle.reader import Bundle
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.engine.segments import last_row


@pytest.mark.parametrize("shape", [(3, 5), (1, 3, 5), (1, 3, 2, 4)])
def test_the_last_row_stays_when_its_value_goes(shape: tuple[int, ...]) -> None:
    """A value made from an array does not keep it, so that what is taken out of it has to be a copy."""
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    last = last_row(ort.OrtValue.ortvalue_from_numpy(array)).numpy()
    expected = (array[-1:] if len(shape) == 2 else array[:, -1:]).copy()
    array[...] = -1  # what others do with memory that is nobody's any more
    np.testing.assert_array_equal(last, expected)


def test_what_only_experts_take_goes_when_they_have_run(tiny_bundle: Callable[[str], Bundle]) -> None:
    """A chunk takes no layer's states, choices and weights past that layer: that would be memory by the layer."""
    bundle = tiny_bundle("olmoe")
    layers = bundle.manifest.moe_layers
    carried: list[set[str]] = []
    with Engine(bundle, EngineOptions(MemoryRequest(expert_share=1.0), capacity=40, chunk=16)) as engine:
        engine.on_segment = lambda values: carried.append(set(values))
        engine.feed(list(range(1, 33)))
    assert len(layers) > 1
    assert carried
    for names in carried:
        assert sum({layer.x, layer.expert_ids, layer.expert_weights} <= names for layer in layers) <= 1
        assert sum(layer.x in names for layer in layers) <= 1
