"""Weights in eight-bit floats, as they are published: each with a scale, by which its values are multiplied.

The scale is one number, one per row (output), or one per block: DeepSeek-V3 stores `weight` as float8_e4m3fn with
`weight_scale_inv`, float32 [ceil(rows / 128), ceil(columns / 128)] (its inference/kernel.py, `weight_dequant`; despite
the name it is no inverse). AutoFP8 and compressed-tensors call theirs `weight_scale`. Experts that are fused into one
tensor have a scale with the experts as its first axis.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from pocketmoe.errors import BadInput, UnsupportedModel

if TYPE_CHECKING:
    import torch

METHODS = ("fp8", "compressed-tensors")
_SCALES = ("_scale_inv", "_scale")  # follow the weight's own name
_ACTIVATIONS = (".activation_scale", ".input_scale", "_activation_scale", "_input_scale", ".k_scale", ".v_scale")


def is_readable(settings: Mapping[str, Any]) -> bool:
    """Whether the `quantization_config` of one of METHODS, or of another, means eight-bit floats where it is one."""
    return settings.get("quant_method") != "compressed-tensors" or settings.get("format") == "float-quantized"


class Scales:
    """Which tensors of a checkpoint scale which; none, where its method is not one of METHODS."""

    def __init__(self, method: str | None, settings: Mapping[str, Any], keys: Collection[str]) -> None:
        self._of: dict[str, str] = {}
        self.hidden: set[str] = set()  # what is no weight of the model: scales of weights and of activations
        self.block = _block(settings)
        if method not in METHODS:
            return
        for key in keys:
            for suffix in _SCALES:
                if key.endswith(suffix) and key.removesuffix(suffix) in keys:
                    self._of[key.removesuffix(suffix)] = key
        self.hidden = {*self._of.values(), *(key for key in keys if key.endswith(_ACTIVATIONS))}

    def of(self, key: str) -> str | None:
        """The name of the tensor that scales `key`."""
        return self._of.get(key)


def _block(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where the shape of the scales says it."""
    block = settings.get("weight_block_size")
    if isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block):
        return block[0], block[1]
    return None


def dequantize(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None, name: str) -> torch.Tensor:
    """float32 [..., rows, columns] that an eight-bit `weight` of that shape and its scale stand for.

    `scale`: one number, [..., 1, 1], [..., rows, 1] or [..., rows]; with a `block`, [..., ceil(rows / block rows),
    ceil(columns / block columns)]. Raises BadInput, with `name`, for any other shape, UnsupportedModel for integers
    (MXFP8's exponents, packed FP4).
    """
    import torch

    if not (weight.is_floating_point() and scale.is_floating_point()):
        raise UnsupportedModel(
            f"{name} is stored as {weight.dtype} with scales in {scale.dtype}",
            "Save the checkpoint in bfloat16, float16 or float32 first.",
        )
    values, factors = weight.to(torch.float32), scale.to(torch.float32)
    lead = weight.shape[:-2]
    if factors.numel() == 1:
        return values * factors.reshape(())
    rows, columns = weight.shape[-2:] if weight.ndim > 1 else (1, 1)
    if block is not None and factors.shape == (*lead, math.ceil(rows / block[0]), math.ceil(columns / block[1])):
        factors = factors.repeat_interleave(block[0], -2)[..., :rows, :]
        return values * factors.repeat_interleave(block[1], -1)[..., :columns]
    if block is None and factors.numel() == math.prod(lead):  # one per expert
        return values * factors.reshape(*lead, 1, 1)
    if block is None and factors.numel() == math.prod(lead) * rows:  # one per output
        return values * factors.reshape(*lead, rows, 1)
    raise BadInput(
        f"{name} has shape {list(weight.shape)}, its scale {list(scale.shape)}",
        "Use the config.json that belongs to these weights.",
    )
