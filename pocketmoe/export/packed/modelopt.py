"""NVFP4 as NVIDIA's ModelOpt saves it.

weight uint8 [N, K / 2], two E2M1 codes an octet, low half first; weight_scale float8_e4m3fn [N, K / 16]; and
weight_scale_2, one float32 number: a value is level[code] * (weight_scale * weight_scale_2).
"""

from __future__ import annotations

import math
from functools import partial

from pocketmoe.export.packed.grid import Form, Grid, Packed, Read, e2m1_levels, misfit, nibbles
from pocketmoe.export.tensors.shards import Shards

ENDING = ".weight_scale_2"
_GROUP = 16


def packed(shards: Shards, module: str) -> Packed | None:
    """The weight of a module with a `.weight_scale_2`; None where it is in another format. Raises BadInput."""
    key, scale, whole = (f"{module}.weight{part}" for part in ("", "_scale", "_scale_2"))
    if key not in shards or shards.dtype(key) != "U8":
        return None
    shape = shards.shape(key)
    if scale not in shards or shards.dtype(scale) != "F8_E4M3" or math.prod(shards.shape(whole)) != 1:
        raise misfit(shards.where(key), "has no weight_scale of eight-bit floats, or no one weight_scale_2, beside it")
    if len(shape) != 2 or shards.shape(scale) != (shape[0], shape[1] * 2 // _GROUP) or shape[1] * 2 % _GROUP:
        raise misfit(shards.where(key), f"has shape {list(shape)}, its scale {list(shards.shape(scale))}")
    form = Form("e2m1", 4, _GROUP)
    make = partial(_grid, key=key, scale=scale, whole=whole, form=form)
    name = f"NVFP4 (ModelOpt), group {_GROUP}"
    return Packed(key, (shape[0], shape[1] * 2), (key, scale, whole), name, form, make)


def _grid(read: Read, key: str, scale: str, whole: str, form: Form) -> Grid:
    scales = read(scale).float() * read(whole).float().reshape(())
    return Grid(form, nibbles(read(key)), scales, levels=e2m1_levels())
