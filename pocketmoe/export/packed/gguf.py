"""GGUF's blocks, in a tensor of octets for each matrix: Q4_0 and Q8_0 as codes, all others by the gguf package.

Q4_0: 18 octets for 32 weights: the scale d in float16, then sixteen pairs of codes, the first half of the weights in
the low halves: d * (code - 8). Q8_0: 34 octets: d, then 32 signed codes: d * code. Products are float32, as in
gguf/quants.py.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pocketmoe.errors import UnsupportedModel
from pocketmoe.export.packed.grid import Form, Grid, Packed, Read, misfit
from pocketmoe.export.tensors.quantization import REMEDY
from pocketmoe.export.tensors.shards import Shards

if TYPE_CHECKING:
    import torch

BLOCKS = ".gguf_"  # in the place of `.weight`, before the type's name
_BLOCK = 32


def packed(shards: Shards, key: str) -> Packed:
    """The weight whose blocks are the tensor `key`. Raises BadInput, UnsupportedModel."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    module, _, name = key.rpartition(BLOCKS)
    where, shape = shards.where(key), shards.shape(key)
    kind = next((kind for kind in GGMLQuantizationType if kind.name == name), None)
    if kind is None:
        raise UnsupportedModel(f"{where} is in blocks of {name[:20]}, which is not known", REMEDY)
    block, nbytes = GGML_QUANT_SIZES[kind]
    if shards.dtype(key) != "U8" or len(shape) != 2 or shape[1] % nbytes:
        raise misfit(where, f"is {shards.dtype(key)} {list(shape)}, no rows of blocks of {nbytes}")
    size = shape[0], shape[1] // nbytes * block
    coded = name in ("Q4_0", "Q8_0")
    form = Form("int", 4 if name == "Q4_0" else 8, _BLOCK)
    make = partial(_codes if coded else _values, key=key, form=form, kind=name, where=where)
    return Packed(f"{module}.weight", size, (key,), f"GGUF {name}", form, make, lambda _: coded)


def _codes(read: Read, key: str, form: Form, kind: str, where: str) -> Grid:  # noqa: ARG001
    import torch

    stored = read(key)
    blocks = stored.reshape(len(stored), -1, 18 if form.bits == 4 else 34)
    scales = blocks[:, :, :2].contiguous().view(torch.float16).squeeze(-1)
    octets = blocks[:, :, 2:]
    # signed codes to what lies 128 above, where there are eight bits
    codes = torch.cat([octets & 15, octets >> 4], -1) if form.bits == 4 else octets ^ 128
    return Grid(form, codes.reshape(len(stored), -1), scales)


def _values(read: Read, key: str, form: Form, kind: str, where: str) -> Grid:
    """By the published arithmetic; each weight is its own scale."""
    import torch
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        values: torch.Tensor = torch.from_numpy(dequantize(read(key).numpy(), GGMLQuantizationType[kind]).copy())
    except NotImplementedError as error:
        raise UnsupportedModel(
            f"{where} is in blocks of {kind}, which the gguf package does not read", REMEDY
        ) from error
    codes = torch.ones((), dtype=torch.uint8).expand(values.shape)
    levels = torch.ones(16)
    return Grid(Form(form.kind, form.bits, 1), codes, values, levels=levels)
