"""Codes that are kept: what a format makes of them is what they stood for, and nothing else is taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketmoe.coded import CodeForm, Codes
from pocketmoe.errors import GateFailed
from pocketmoe.quantize.algorithms.formats import BlockFormat, FloatFormat, dequantize, float_values
from pocketmoe.quantize.kept import format_of, matrix_of


def codes(form: CodeForm, n: int, k: int, seed: int) -> Codes:
    """Random ones of a form, in groups of its size."""
    rng = np.random.default_rng(seed)
    groups = -(-k // form.group)

    def spread(of_groups: np.ndarray) -> np.ndarray:
        return np.repeat(of_groups, form.group, axis=1)[:, :k]

    zeros = spread(rng.integers(0, 1 << form.bits, (n, groups), dtype=np.uint8)) if form.zeros else None
    scales = spread(rng.standard_normal((n, groups), np.float32))
    return Codes(rng.integers(0, 1 << form.bits, (n, k), dtype=np.uint8), scales, zeros)


def meant(form: CodeForm, found: Codes) -> np.ndarray:
    if form.kind != "int":
        return float_values(form.kind)[found.codes] * found.scales
    zeros = np.uint8(1 << (form.bits - 1)) if found.zeros is None else found.zeros
    return (found.codes.astype(np.float32) - zeros) * found.scales


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from([2, 4, 8]),
    zeros=st.booleans(),
    group=st.sampled_from([16, 24, 32, 48, 64, 80, 128, 256, 1000]),
    n=st.integers(1, 9),
    k=st.integers(16, 300),
    by_rows=st.booleans(),
    seed=st.integers(0, 99),
)
def test_integers_mean_the_same_in_any_block_that_divides_their_group(
    bits: int, zeros: bool, group: int, n: int, k: int, by_rows: bool, seed: int
) -> None:
    form = CodeForm("int", bits, group, zeros)
    found = codes(form, n, k, seed)
    kept = format_of(form, k)
    if group % 16 and group < k:
        assert kept is None
        return
    assert isinstance(kept, BlockFormat)
    assert kept.symmetric != zeros
    turned = Codes(found.codes.T, found.scales.T, None if found.zeros is None else found.zeros.T)
    stored = found if by_rows else turned
    matrix = matrix_of(stored, kept, by_rows=by_rows, name="w")
    np.testing.assert_array_equal(dequantize(matrix), meant(form, found))
    assert [part.shape for part in matrix.parts] == kept.shapes(n, k)


@pytest.mark.parametrize(
    ("group", "k", "block"), [(64, 128, 64), (32, 64, 32), (256, 512, 128), (64, 48, None), (16, 64, None)]
)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_floats_mean_the_same(kind: Any, group: int, k: int, block: int | None) -> None:
    """bitsandbytes' blocks of 16 have no kernel, and rows that are not made of blocks none either."""
    form = CodeForm(kind, 4, group, zeros=False)
    kept = format_of(form, k)
    assert kept == (None if block is None else FloatFormat(kind, block))
    if kept is not None:
        found = codes(form, 5, k, 0)
        matrix = matrix_of(found, kept, by_rows=True, name="w")
        np.testing.assert_array_equal(dequantize(matrix), meant(form, found))


def test_a_block_of_several_scales_is_not_kept_in_silence() -> None:
    found = codes(CodeForm("int", 4, 16, zeros=False), 3, 64, 0)
    with pytest.raises(GateFailed, match="layer 0, w"):
        matrix_of(found, BlockFormat(4, 32), by_rows=True, name="layer 0, w")
