"""Integers packed into words or a byte each, and four-bit floats, as llm-compressor saves them (compressed-tensors).

pack-quantized: weight_packed int32 [N, ceil(K * bits / 32)], codes in a row, with weight_shape [2] and weight_scale
[N, groups] ([N, 1] per channel, one number per tensor); weight_zero_point int32 [ceil(N * bits / 32), groups], packed
down the columns; weight_g_idx [K] of those that were ordered by activation. int-quantized and naive-quantized: weight
int8 [N, K], with weight_zero_point of the scale's shape. nvfp4-pack-quantized: weight_packed uint8 [N, K / 2],
weight_scale float8_e4m3fn [N, K / 16], divided by weight_global_scale; mxfp4-pack-quantized: weight_scale uint8
[N, K / 32], powers of two less 127.

Values are (code - zero) * scale in the type of the scale (quantization/lifecycle/forward_helpers.py, `_dequantize`);
of four-bit floats in bfloat16 (compressors/nvfp4/base.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from pocketmoe.errors import UnsupportedModel
from pocketmoe.export.packed.grid import Form, Grid, Packed, Read, e2m1_levels, misfit, nibbles, unpack_bits
from pocketmoe.export.tensors.quantization import REMEDY, Quantization, refuse
from pocketmoe.export.tensors.shards import FLOATS, Shards
from pocketmoe.jsonfile import is_object

if TYPE_CHECKING:
    import torch

ENDING = ".weight_packed"
_REFUSED = ("marlin-24", "sparse", "mxfp6")  # words of a `format` whose packing is not read


def packed(shards: Shards, stated: Quantization, module: str) -> Packed:
    """The weight of a module with a `.weight_packed`. Raises BadInput, UnsupportedModel."""
    key = f"{module}{ENDING}"
    where, dtype, shape = shards.where(key), shards.dtype(key), shards.shape(key)
    formats = [str(holder.get("format")) for holder in (stated.settings, *_groups(stated))]
    if refused := [name for name in formats if any(word in name for word in _REFUSED)]:
        raise UnsupportedModel(f"{where} is packed as {refused[0][:40]}, which is not read ({stated.where})", REMEDY)
    scale = f"{module}.weight_scale"
    if scale not in shards:
        raise refuse(f"{where}, without {scale!r},", dtype, stated, "compressed-tensors")
    if len(shape) != 2:
        raise UnsupportedModel(f"{where} has shape {list(shape)}: packed experts of one tensor are not read", REMEDY)
    if dtype == "U8" and shards.dtype(scale) in ("F8_E4M3", "U8"):
        return _four_bit_floats(shards, module, shape)
    if dtype != "I32" or shards.dtype(scale) not in FLOATS:
        raise misfit(where, f"is stored as {dtype}, with scales in {shards.dtype(scale)}")
    return _packed_integers(shards, stated, module, shape)


def octets(shards: Shards, module: str) -> Packed:
    """The weight of a module whose `.weight` is int8, with a `.weight_scale`. Raises BadInput."""
    key, scale, zero = (f"{module}.weight{part}" for part in ("", "_scale", "_zero_point"))
    where, shape = shards.where(key), shards.shape(key)
    if len(shape) != 2 or shards.dtype(scale) not in FLOATS:
        raise misfit(where, f"has shape {list(shape)}, with scales in {shards.dtype(scale)}")
    group, words = _group_of(where, shards.shape(scale), (shape[0], shape[1]))
    zeros = zero if zero in shards else None
    if zeros is not None and (shards.dtype(zeros) != "I8" or shards.shape(zeros) != shards.shape(scale)):
        raise misfit(shards.where(zeros), f"has shape {list(shards.shape(zeros))}, unlike its scale")
    form = Form("int", 8, group, zeros=zeros is not None)
    make = partial(_grid, key=key, scale=scale, zeros=zeros, order=lambda _: None, form=form, k=shape[1])
    parts = tuple(name for name in (key, scale, zeros) if name is not None)
    return Packed(key, (shape[0], shape[1]), parts, f"compressed-tensors int8, {words}", form, make)


def _groups(stated: Quantization) -> Iterator[dict[str, Any]]:
    groups = stated.settings.get("config_groups")
    yield from (group for group in groups.values() if is_object(group)) if is_object(groups) else ()


def _packed_integers(shards: Shards, stated: Quantization, module: str, shape: tuple[int, ...]) -> Packed:
    key, scale, zero = (f"{module}.weight{part}" for part in ("_packed", "_scale", "_zero_point"))
    where = shards.where(key)
    n, width = shape
    stored = _stored_shape(shards, module)
    named = [bits for group in _groups(stated) if (bits := _weight_bits(group)) is not None]
    columns = [stored[1]] if stored else [width * 32 // bits for bits in named if 32 % bits == 0]
    fitting = {(bits, k) for k in columns for bits in (named or range(2, 9)) if math.ceil(k * bits / 32) == width}
    if len(fitting) != 1 or (stored and stored[0] != n):
        said = f"a weight {list(stored)}" if stored else "no weight_shape"
        raise misfit(where, f"has shape {list(shape)}, {said}, and {stated.where} says {sorted(set(named))} bits")
    bits, k = fitting.pop()
    group, words = _group_of(where, shards.shape(scale), (n, k))
    zeros = zero if zero in shards else None
    groups = math.ceil(k / group)
    if zeros is not None and (
        shards.dtype(zeros) != "I32" or shards.shape(zeros) != (math.ceil(n * bits / 32), groups)
    ):
        raise misfit(shards.where(zeros), f"has shape {list(shards.shape(zeros))}, which does not fit its weight")
    index = f"{module}.weight_g_idx" if f"{module}.weight_g_idx" in shards else None
    if index is not None and (shards.dtype(index) not in ("I32", "I64") or shards.shape(index) != (k,)):
        raise misfit(shards.where(index), f"has shape {list(shards.shape(index))}, for {k} inputs")
    form = Form("int", bits, group, zeros=zeros is not None)
    order = partial(_order, index=index, group=group, groups=groups, where=where)
    make = partial(_grid, key=key, scale=scale, zeros=zeros, order=order, form=form, k=k)
    parts = tuple(name for name in (key, scale, zeros, index) if name is not None)
    if f"{module}.weight_shape" in shards:
        parts = (*parts, f"{module}.weight_shape")
    words = f"compressed-tensors int{bits}, {words}"
    return Packed(f"{module}.weight", (n, k), parts, words, form, make, lambda read: order(read) is None)


def _stored_shape(shards: Shards, module: str) -> tuple[int, int] | None:
    """What weight_shape says; None where there is none."""
    name = f"{module}.weight_shape"
    if name not in shards:
        return None
    if shards.dtype(name) not in ("I64", "I32") or shards.shape(name) != (2,):
        raise misfit(shards.where(name), f"is {shards.dtype(name)} {list(shards.shape(name))}, not two whole numbers")
    stored = shards.read(name)
    return int(stored[0]), int(stored[1])


def _weight_bits(group: dict[str, Any]) -> int | None:
    weights = group.get("weights")
    bits = weights.get("num_bits") if is_object(weights) else None
    return bits if isinstance(bits, int) and not isinstance(bits, bool) and 2 <= bits <= 8 else None


def _group_of(where: str, scale: tuple[int, ...], shape: tuple[int, int]) -> tuple[int, str]:
    """Inputs with one scale, and how that is called. Raises BadInput for scales that fit no groups."""
    n, k = shape
    if math.prod(scale) == 1:
        return k, "per tensor"
    rows, groups = (*scale, 1)[:2] if scale else (0, 0)
    if len(scale) > 2 or rows != n or not groups or k % groups:
        raise misfit(where, f"stands for a weight {list(shape)}, its scale has shape {list(scale)}")
    return k // groups, "per channel" if groups == 1 else f"group {k // groups}"


def _grid(
    read: Read,
    key: str,
    scale: str,
    zeros: str | None,
    order: Callable[[Read], torch.Tensor | None],
    form: Form,
    k: int,
) -> Grid:
    import torch

    words = read(key)
    n = len(words)
    codes = (words.short() + 128).byte() if words.dtype == torch.int8 else unpack_bits(words, form.bits, k)
    scales = read(scale)
    scales = scales.reshape(1, 1).expand(n, 1) if scales.numel() == 1 else scales.reshape(n, -1)
    points = None if zeros is None else _zero_points(read(zeros), form.bits, n)
    dtype = str(scales.dtype).removeprefix("torch.")
    if points is not None:
        points = points.reshape(1, 1).expand(n, 1) if points.numel() == 1 else points.reshape(n, -1)
    return Grid(form, codes, scales, points, order(read), dtype=dtype)


def _zero_points(stored: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """int16, on the codes' own scale, where 0 is the lowest."""
    import torch

    return stored.short() + 128 if stored.dtype == torch.int8 else unpack_bits(stored.T, bits, n).T.short()


def _order(read: Read, index: str | None, group: int, groups: int, where: str) -> torch.Tensor | None:
    """The group of each input; None where they are in a row."""
    import torch

    if index is None:
        return None
    found = read(index).long()
    if not found.any() or int(found.min()) < 0:  # -1: left as it was made
        return None
    if int(found.max()) >= groups:
        raise misfit(where, f"has groups up to {int(found.max())} in its weight_g_idx, of {groups}")
    return None if torch.equal(found, torch.arange(len(found)) // group) else found


def _four_bit_floats(shards: Shards, module: str, shape: tuple[int, ...]) -> Packed:
    key, scale, whole = (f"{module}.weight{part}" for part in ("_packed", "_scale", "_global_scale"))
    n, k = shape[0], shape[1] * 2
    nv = shards.dtype(scale) == "F8_E4M3"
    group = 16 if nv else 32
    if shards.shape(scale) != (n, k // group) or k % group or nv != (whole in shards):
        raise misfit(shards.where(key), f"has shape {list(shape)}, its scale {list(shards.shape(scale))}")
    if nv and math.prod(shards.shape(whole)) != 1:
        raise misfit(shards.where(whole), f"has shape {list(shards.shape(whole))}, not one number")
    form = Form("e2m1", 4, group)
    make = partial(_float_grid, key=key, scale=scale, whole=whole if nv else None, form=form)
    parts = (key, scale, whole) if nv else (key, scale)
    name = f"{'NVFP4' if nv else 'MXFP4'} (compressed-tensors), group {group}"
    return Packed(f"{module}.weight", (n, k), parts, name, form, make)


def _float_grid(read: Read, key: str, scale: str, whole: str | None, form: Form) -> Grid:
    import torch

    if whole is None:
        scales = 2.0 ** (read(scale).int() - 127).to(torch.bfloat16)
    else:
        scales = read(scale).to(torch.bfloat16) / read(whole).float().reshape(1)
    return Grid(form, nibbles(read(key)), scales, levels=e2m1_levels(), dtype="bfloat16")
