"""NF4, FP4 (statistics quantized again or not) and LLM.int8(), as transformers saves them (bitsandbytes).

Four bits: weight, two codes an octet, high half first, whatever type it is stored as; weight.quant_map float32 [16],
weight.absmax, one per block of the flattened weight: float32, or octets that weight.nested_quant_map [256] and
weight.nested_absmax (one per nested_blocksize of them) stand for, plus nested_offset; weight.quant_state.
bitsandbytes__nf4 or __fp4: JSON with shape, blocksize, dtype. A value is quant_map[code] * absmax, rounded to dtype.
Eight bits: weight int8 [N, K] and SCB float32 [N]: a value is code * SCB * (1 / 127).
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pocketmoe.errors import DamagedFile, UnsupportedModel
from pocketmoe.export.packed.grid import Form, Grid, Kind, Packed, Read, misfit
from pocketmoe.export.tensors.quantization import REMEDY
from pocketmoe.export.tensors.shards import Shards
from pocketmoe.jsonfile import is_array, parse_object

if TYPE_CHECKING:
    import torch

STATE = ".quant_state.bitsandbytes__"
EIGHT_BITS = ".SCB"
_SEVENTH = 1 / 127  # 7.874015718698502e-3
_MOST_STATE = 4096  # bytes
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = ("float32", "float16", "bfloat16")


def four_bits(shards: Shards, state: str) -> Packed:
    """The weight whose state is the tensor `state`. Raises BadInput, DamagedFile, UnsupportedModel."""
    key, _, kind = state.partition(STATE)
    where = shards.where(state)
    if kind not in ("nf4", "fp4"):
        raise UnsupportedModel(f"{where} names the format {kind[:40]!r}, which is not known", REMEDY)
    shape, block, dtype, said = _read_state(shards, state)
    n_weights, n_blocks = math.prod(shape), math.ceil(math.prod(shape) / block)
    absmax, values = f"{key}.absmax", f"{key}.quant_map"
    if key not in shards or absmax not in shards or values not in shards:
        raise misfit(where, "has no weight, absmax or quant_map beside it")
    nested = shards.dtype(absmax) == "U8"
    extra = f"{key}.nested_absmax", f"{key}.nested_quant_map"
    found = math.prod(shards.shape(key)) * _width(shards.dtype(key))
    there = found, math.prod(shards.shape(absmax)), shards.shape(values)
    if there != (math.ceil(n_weights / 2), n_blocks, (16,)):
        raise misfit(where, f"says {list(shape)} in blocks of {block}, which its weight and absmax do not make")
    if nested and not (extra[0] in shards and extra[1] in shards and shards.shape(extra[1]) == (256,)):
        raise misfit(where, "has an absmax of octets, and not what these stand for")
    whole = shape[1] % block == 0
    form = Form(cast("Kind", kind), 4, block)
    make = partial(_four_bit_grid, key=key, state=said, shape=shape, form=form, dtype=dtype, where=where)
    name = f"bitsandbytes {kind.upper()}, block {block}{', nested' if nested else ''}"
    parts = (key, state, absmax, values, *(extra if nested else ()))
    usual = partial(_is_usual, values=values, kind=kind)
    return Packed(key, shape, parts, name, form, make, lambda read: whole and usual(read))


def _is_usual(read: Read, values: str, kind: str) -> bool:
    """Whether the values are those that the name means, and MatMulBnb4 computes with."""
    import torch
    from bitsandbytes.functional import get_4bit_type  # pyright: ignore[reportUnknownVariableType]

    return torch.equal(read(values).float(), get_4bit_type(kind, device="cpu"))


def _width(dtype: str) -> int:
    """Octets of one number of a dtype in safetensors' words."""
    return {"U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4}.get(dtype, 0)


def _read_state(shards: Shards, name: str) -> tuple[tuple[int, int], int, str, dict[str, Any]]:
    """Shape [N, K], weights per block, the type of what comes out, and all that the state says."""
    where = shards.where(name)
    if shards.dtype(name) != "U8" or not 0 < math.prod(shards.shape(name)) <= _MOST_STATE:
        raise misfit(where, f"is {shards.dtype(name)} {list(shards.shape(name))}, no text")
    try:
        said = parse_object(shards.read(name).numpy().tobytes(), Path(name))
    except DamagedFile as error:
        raise misfit(where, "holds no JSON object") from error
    shape, block, dtype = said.get("shape"), said.get("blocksize"), said.get("dtype")
    sizes = [side for side in shape if isinstance(side, int) and 0 < side < 1 << 31] if is_array(shape) else []
    if not is_array(shape) or len(shape) != 2 or len(sizes) != 2:
        raise misfit(where, f"says shape {str(shape)[:60]}, not two sizes")
    if block not in _BLOCKS or dtype not in _DTYPES:
        raise misfit(where, f"says blocksize {str(block)[:20]} and dtype {str(dtype)[:20]}")
    return (sizes[0], sizes[1]), block, dtype, said


def _four_bit_grid(
    read: Read, key: str, state: dict[str, Any], shape: tuple[int, int], form: Form, dtype: str, where: str
) -> Grid:
    import torch

    n, k = shape
    stored = read(key).contiguous().view(torch.uint8).flatten()
    codes = torch.stack([stored >> 4, stored & 15], -1).flatten()[: n * k]
    absmax = read(f"{key}.absmax").flatten()
    if absmax.dtype == torch.uint8:
        absmax = _unnested(absmax, read, key, state, where)
    absmax = absmax.float()
    levels = read(f"{key}.quant_map").float()
    if k % form.group:  # blocks straddle rows: each weight with its own scale
        scales = absmax.repeat_interleave(form.group)[: n * k].reshape(n, k)
        return Grid(Form(form.kind, 4, 1), codes.reshape(n, k), scales, levels=levels, dtype=dtype)
    return Grid(form, codes.reshape(n, k), absmax.reshape(n, -1), levels=levels, dtype=dtype)


def _unnested(absmax: torch.Tensor, read: Read, key: str, state: dict[str, Any], where: str) -> torch.Tensor:
    """float32 [blocks]: the statistics that were quantized, themselves in blocks."""
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    inner = read(f"{key}.nested_absmax").float().flatten()
    if block not in _BLOCKS or not isinstance(offset, int | float) or len(inner) != math.ceil(len(absmax) / block):
        raise misfit(where, f"says nested_blocksize {str(block)[:20]} and nested_offset {str(offset)[:20]}")
    values = read(f"{key}.nested_quant_map").float()[absmax.long()]
    return values * inner.repeat_interleave(block)[: len(absmax)] + offset


def eight_bits(shards: Shards, module: str) -> Packed:
    """The weight of a module with an `.SCB`. Raises BadInput, UnsupportedModel."""
    key, scale, layout = f"{module}.weight", f"{module}{EIGHT_BITS}", f"{module}.weight_format"
    where = shards.where(scale)
    if key not in shards or shards.dtype(key) != "I8" or len(shape := shards.shape(key)) != 2:
        raise misfit(where, "has no weight of octets beside it")
    if shards.dtype(scale) not in ("F32", "F16", "BF16") or math.prod(shards.shape(scale)) != shape[0]:
        raise misfit(where, f"is {shards.dtype(scale)} {list(shards.shape(scale))}, for a weight {list(shape)}")
    parts = (key, scale)
    if layout in shards:
        parts = (*parts, layout)
        if shards.dtype(layout) != "U8" or shards.read(layout).any():
            raise UnsupportedModel(f"{shards.where(layout)} names a layout other than rows", REMEDY)
    form = Form("int", 8, shape[1])
    make = partial(_eight_bit_grid, key=key, scale=scale, form=form)
    return Packed(key, (shape[0], shape[1]), parts, "bitsandbytes LLM.int8(), per channel", form, make)


def _eight_bit_grid(read: Read, key: str, scale: str, form: Form) -> Grid:
    codes = (read(key).short() + 128).byte()
    return Grid(form, codes, read(scale).float().reshape(-1, 1), factor=_SEVENTH)
