"""Rounding to four-bit floats, by bitsandbytes."""

from __future__ import annotations

from typing import cast

import numpy as np

from pocketmoe.errors import BadInput
from pocketmoe.quantize.algorithms.formats import FloatFormat, Floats, QuantizedMatrix


def quantize_float4(weight: Floats, form: FloatFormat, *, name: str) -> QuantizedMatrix:
    """Quantize W, float32 [N, K], K a multiple of the block. Raises BadInput, with `name`, for NaN or infinity."""
    import torch
    from bitsandbytes.functional import quantize_4bit  # pyright: ignore[reportUnknownVariableType]

    if not np.isfinite(weight).all():
        raise BadInput(f"{name} holds NaN or infinity", "The checkpoint is damaged: get it again.")
    tensor = torch.from_numpy(np.ascontiguousarray(weight))
    codes, state = quantize_4bit(tensor, blocksize=form.block, quant_type=form.values, compress_statistics=False)
    scales = cast("torch.Tensor", state.absmax).numpy().astype(np.float32)
    n = len(weight)
    return QuantizedMatrix(form, weight.shape[1], codes.numpy().reshape(n, -1), scales.reshape(n, -1))
