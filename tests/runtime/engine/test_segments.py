"""The last row of a value, which the head is given alone."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest

from pocketmoe.runtime.engine.segments import last_row


@pytest.mark.parametrize("shape", [(3, 5), (1, 3, 5), (1, 3, 2, 4)])
def test_the_last_row_stays_when_its_value_goes(shape: tuple[int, ...]) -> None:
    """A value made from an array does not keep it, so that what is taken out of it has to be a copy."""
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    last = last_row(ort.OrtValue.ortvalue_from_numpy(array)).numpy()
    expected = (array[-1:] if len(shape) == 2 else array[:, -1:]).copy()
    array[...] = -1  # what others do with memory that is nobody's any more
    np.testing.assert_array_equal(last, expected)
