"""Weights in eight-bit floats, as they are published: each with a scale, by which its values are multiplied.

The scale is one number, one per row (output), per column, or per block: DeepSeek-V3 stores `weight` as float8_e4m3fn
with `weight_scale_inv`, float32 [ceil(rows / 128), ceil(columns / 128)] (its inference/kernel.py, `weight_dequant`;
despite the name it is no inverse). AutoFP8, compressed-tensors, fbgemm and ModelOpt call theirs `weight_scale`. Experts
that are fused into one tensor have a scale with the experts as its first axis.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from typing import TYPE_CHECKING

from pocketmoe.errors import BadInput, UnsupportedModel

if TYPE_CHECKING:
    import torch

DTYPES = ("F8_E4M3", "F8_E5M2")
SCALE_DTYPES = ("F8_E8M0",)  # beside the usual floats: powers of two
USUAL_BLOCK = 128
_SCALES = ("_scale_inv", "_scale")  # follow the weight's own name
_MODULE_SCALES = (".scale", ".qscale_weight")  # in the place of `.weight`
_OTHERS = (
    "activation_scale",
    "input_scale",
    "input_global_scale",
    "k_scale",
    "v_scale",
    "q_scale",
    "output_scale",
    "qscale_act",
)


def scale_of(key: str, keys: Container[str]) -> str | None:
    """The tensor among `keys` that scales the weight `key`, if it is stored in eight bits."""
    names = [f"{key}{suffix}" for suffix in _SCALES]
    if key.endswith(".weight"):
        names += [key.removesuffix(".weight") + suffix for suffix in _MODULE_SCALES]
    return next((name for name in names if name in keys), None)


def is_other_scale(key: str) -> bool:
    """Whether a tensor scales activations or caches, which are not kept in eight bits here."""
    return key.endswith(_OTHERS)


def dequantize(
    weight: torch.Tensor, scale: torch.Tensor, blocks: Iterable[tuple[int, int]], name: str, *, transposed: bool = False
) -> torch.Tensor:
    """float32 [..., rows, columns] that an eight-bit `weight` of that shape and its scale stand for.

    `scale`: one number, [..., 1, 1], [..., rows, 1], [..., rows], [..., 1, columns], or one per block, also with axes
    of one between (ModelOpt: [n, 1, m, 1]). `blocks` resolves which, where its shape leaves that open. `transposed`: an
    output is a column, whatever the shape of its scale (fbgemm's experts: [..., outputs, 1]).
    Raises BadInput, with `name`, for other shapes, UnsupportedModel for scales that are no floats (MXFP8's exponents).
    """
    import torch

    if not scale.is_floating_point():
        raise UnsupportedModel(
            f"{name} is stored as {weight.dtype} with scales in {scale.dtype}",
            "Save the checkpoint in bfloat16, float16 or float32 first.",
        )
    values, factors = weight.to(torch.float32), scale.to(torch.float32)
    if factors.numel() == 1:
        return values * factors.reshape(())
    lead = weight.shape[:-2]
    if transposed and factors.numel() == math.prod(lead) * weight.shape[-1]:
        return values * factors.reshape(*lead, 1, weight.shape[-1])
    wrong = BadInput(
        f"{name} has shape {list(weight.shape)}, its scale {list(scale.shape)}, which fits no known blocks of it",
        "Use the config.json that belongs to these weights.",
    )
    if weight.ndim < 2:
        raise wrong
    factors = _with_axes(factors, weight.ndim)
    if factors.ndim != weight.ndim or factors.shape[:-2] != lead:
        raise wrong
    block = _block(weight.shape[-2:], factors.shape[-2:], list(blocks))
    if block is None:
        raise wrong
    for axis in (-2, -1):
        if block[axis] > 1 and factors.shape[axis] > 1:
            factors = factors.repeat_interleave(block[axis], axis).narrow(axis, 0, weight.shape[axis])
    return values * factors


def _with_axes(factors: torch.Tensor, ndim: int) -> torch.Tensor:
    """The scale with as many axes as its weight."""
    if factors.ndim == ndim + 2 and factors.shape[-1] == factors.shape[-3] == 1:
        return factors.squeeze(-1).squeeze(-2)
    if factors.ndim < ndim:
        return factors.reshape(*factors.shape, *[1] * (ndim - factors.ndim))
    return factors


def _block(shape: Iterable[int], n_scales: Iterable[int], named: list[tuple[int, int]]) -> tuple[int, int] | None:
    """How many rows and columns share a scale; None where no size fits, or several do that differ in effect."""
    sizes = list(zip(shape, n_scales, strict=True))
    if any(_fits(block[0], *sizes[0]) and _fits(block[1], *sizes[1]) for block in named):
        fitting = {
            tuple(min(b, size) for b, (size, _) in zip(block, sizes, strict=True))
            for block in named
            if all(_fits(b, *axis) for b, axis in zip(block, sizes, strict=True))
        }
        return next(iter(fitting)) if len(fitting) == 1 else None  # type: ignore[return-value]
    by_axis = [_usual(size, n, may_infer=not named) for size, n in sizes]
    return None if None in by_axis else (by_axis[0], by_axis[1])  # type: ignore[return-value]


def _fits(block: int, size: int, n_scales: int) -> bool:
    return math.ceil(size / block) == n_scales


def _usual(size: int, n_scales: int, *, may_infer: bool) -> int | None:
    """How many of `size` neighbours share each of `n_scales` scales: all, one, or the one block size that fits."""
    if n_scales < 1:
        return None
    if n_scales in (1, size):
        return size // n_scales
    candidates: set[int] = {USUAL_BLOCK} if _fits(USUAL_BLOCK, size, n_scales) else set()
    if size % n_scales == 0:
        candidates.add(size // n_scales)
    return candidates.pop() if may_infer and len(candidates) == 1 else None
