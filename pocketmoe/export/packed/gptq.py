"""GPTQ and AWQ: codes and zero points packed into words, scales per group of inputs.

GPTQ (gptqmodel, auto-gptq, optimum, auto-round): qweight int32 [K * bits / 32, N], codes in a row down the columns;
qzeros int32 [groups, N * bits / 32]; scales [groups, N]; g_idx int32 [K], the group of each input, which desc_act
leaves in no order. The first version of the format stores zero points less one: the one is added to the packed words,
carry and all, as gptqmodel does (utils/model.py, convert_gptq_v1_to_v2_format_module).

AWQ (autoawq, gptqmodel; "gemm"): qweight int32 [K, N * bits / 32], qzeros and scales as above; of four bits the eight
codes of a word stand in the order 0 2 4 6 1 3 5 7, of others in a row.

Both are computed as scales * (code - zero), in the type of the scales (TorchLinear.dequantize_weight, dequantize_gemm).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from pocketmoe.errors import UnsupportedModel
from pocketmoe.export.packed.grid import Form, Grid, Packed, Read, misfit, unpack_bits
from pocketmoe.export.tensors.quantization import REMEDY, Quantization, refuse
from pocketmoe.export.tensors.shards import FLOATS, Shards
from pocketmoe.jsonfile import is_object

if TYPE_CHECKING:
    import torch

ENDING = ".qweight"
_BITS = (2, 3, 4, 8)
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
_VERSIONS = {"gptq": 1, "gptq_v2": 2, "gemm": 2}
_MOST_PATTERN = 500


def packed(shards: Shards, stated: Quantization, module: str) -> Packed:
    """The weight of a module with a `.qweight`. Raises BadInput, UnsupportedModel for what is neither GPTQ nor AWQ."""
    names = [f"{module}{ending}" for ending in (ENDING, ".qzeros", ".scales")]
    where = shards.where(names[0])
    if missing := [name for name in names if name not in shards]:
        raise refuse(f"{where}, without {missing[0]!r},", shards.dtype(names[0]), stated, "GPTQ or AWQ")
    codes, zeros, scales = (shards.shape(name) for name in names)
    dtypes = [shards.dtype(name) for name in names]
    if dtypes[:2] != ["I32", "I32"] or dtypes[2] not in FLOATS or not len(codes) == len(zeros) == len(scales) == 2:
        raise misfit(where, f"is stored as {dtypes[0]} {list(codes)}, with scales in {dtypes[2]} {list(scales)}")
    groups, n = scales
    bits = _bits(stated.settings, module, n, zeros[1])
    if bits is None or zeros[0] != groups or not groups:
        raise misfit(where, f"{list(codes)} fits neither zero points {list(zeros)} nor scales {list(scales)}")
    if codes[1] == n and (codes[0] * 32) % bits == 0 and not _is_awq(stated):
        return _gptq(shards, stated, module, bits, (codes[0] * 32 // bits, n, groups))
    if codes[1] == zeros[1]:
        return _awq(shards, stated, module, bits, (codes[0], n, groups))
    raise misfit(where, f"{list(codes)} is laid out neither as GPTQ nor as AWQ (gemm) has it")


def _is_awq(stated: Quantization) -> bool:
    settings = stated.settings
    return "awq" in f"{settings.get('quant_method')} {settings.get('packing_format')}"


def _bits(settings: Mapping[str, Any], module: str, n: int, words: int) -> int | None:
    """Of codes and zero points: what the tensors leave open the settings decide."""
    fitting = [bits for bits in _BITS if math.ceil(n * bits / 32) == words]
    own = _own_settings(settings, module)
    named = [bits for bits in (own.get("bits"), settings.get("bits"), settings.get("w_bit")) if bits is not None]
    sure = len(fitting) == 1 and (not named or any(settings.get(name) for name in ("dynamic", "extra_config")))
    return next((bits for bits in named if bits in fitting), fitting[0] if sure else None)


def _own_settings(settings: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """What `dynamic` (gptqmodel) or `extra_config` (auto-round) says of one module."""
    dynamic, extra = settings.get("dynamic"), settings.get("extra_config")
    for pattern, own in dynamic.items() if is_object(dynamic) else ():
        if is_object(own) and not pattern.startswith("-:") and _matches(pattern.removeprefix("+:"), module):
            return own
    own = extra.get(module) if is_object(extra) else None
    return own if is_object(own) else {}


def _matches(pattern: str, module: str) -> bool:
    try:
        return len(pattern) <= _MOST_PATTERN and re.match(pattern, module) is not None
    except (re.error, RecursionError):
        return False


def _version(stated: Quantization, where: str) -> int:
    """1 where zero points are stored less one. Raises UnsupportedModel for other layouts than the two, by name."""
    settings = stated.settings
    if settings.get("quant_method") == "auto-round":
        packing = str(settings.get("packing_format"))
        return 1 if "gptq" in packing and "gptqmodel" not in packing else 2
    found = [settings.get(name) for name in ("checkpoint_format", "format", "version")]
    name = next((str(value).lower() for value in found if value), "gptq")
    if settings.get("is_marlin_format"):
        name = "marlin"
    if name not in _VERSIONS:
        raise UnsupportedModel(f"{where} is laid out as {name[:40]}, which is not read ({stated.where})", REMEDY)
    return _VERSIONS[name]


def _group(k: int, groups: int, stated: Quantization, module: str) -> int | None:
    """Inputs that share a scale; None where no number of them makes so many groups."""
    even = k // groups if k % groups == 0 else 0
    return next((size for size in (*_sizes(stated, module), even) if size and math.ceil(k / size) == groups), None)


def _sizes(stated: Quantization, module: str) -> list[int]:
    """The group sizes that are stated, the module's own first."""
    named = [_own_settings(stated.settings, module).get("group_size")]
    named += [stated.settings.get(name) for name in ("group_size", "q_group_size")]
    return [size for size in named if isinstance(size, int) and 0 < size < 1 << 31]


def _group_words(group: int, k: int, sizes: list[int]) -> str:
    return f"group {group}" if group < k or group in sizes else "per channel"


def _gptq(shards: Shards, stated: Quantization, module: str, bits: int, sizes: tuple[int, int, int]) -> Packed:
    k, n, groups = sizes
    where = shards.where(f"{module}{ENDING}")
    version = _version(stated, where)
    index = f"{module}.g_idx" if f"{module}.g_idx" in shards else None
    if index is not None:
        length = shards.shape(index)
        if shards.dtype(index) not in ("I32", "I64") or len(length) != 1 or not k - 32 < length[0] <= k:
            raise misfit(shards.where(index), f"has shape {list(length)}, for {k} inputs")
        k = length[0]
    group = _group(k, groups, stated, module)
    if group is None and index is None:
        raise misfit(where, f"has {groups} groups of scales for {k} inputs, which no group size makes")
    form = Form("int", bits, group or k, zeros=True)
    parts = tuple(f"{module}{ending}" for ending in (ENDING, ".qzeros", ".scales"))
    acts = bool(_own_settings(stated.settings, module).get("desc_act", stated.settings.get("desc_act")))
    name = "auto-round (GPTQ)" if stated.settings.get("quant_method") == "auto-round" else "GPTQ"
    words = _group_words(group or k, k, _sizes(stated, module))
    words = f"{name} {bits} bits, {words}{', act-order' if acts and index else ''}"
    order = partial(_group_of, index=index, groups=groups, group=form.group, where=where, acts=acts)
    make = partial(_gptq_grid, module=module, sizes=(k, n), form=form, version=version, order=order)
    parts = (*parts, *([index] if index else []))
    return Packed(f"{module}.weight", (n, k), parts, words, form, make, lambda read: order(read) is None)


def _gptq_grid(
    read: Read,
    module: str,
    sizes: tuple[int, int],
    form: Form,
    version: int,
    order: Callable[[Read], torch.Tensor | None],
) -> Grid:
    k, n = sizes
    codes = unpack_bits(read(f"{module}{ENDING}").T, form.bits, k)
    zeros = _zero_points(read(f"{module}.qzeros"), form.bits, n, version).T
    scales = read(f"{module}.scales").T
    return Grid(form, codes, scales, zeros, order(read), dtype=str(scales.dtype).removeprefix("torch."))


def _group_of(read: Read, index: str | None, groups: int, group: int, where: str, acts: bool) -> torch.Tensor | None:
    """The group of each input; None where they are in a row. Raises BadInput for one that there is not."""
    import torch

    if index is None:
        return None
    found = read(index).long()
    if int(found.min()) < 0 or int(found.max()) >= groups:
        raise misfit(where, f"has groups from {int(found.min())} to {int(found.max())} in its g_idx, of {groups}")
    if groups > 1 and not found.any():
        if acts:
            raise misfit(where, "has a g_idx of zeros alone, although desc_act is said to have moved its inputs")
        return None  # left behind by writers that do not fill it
    in_a_row = torch.arange(len(found)) // group
    return None if torch.equal(found, in_a_row) else found


def _zero_points(words: torch.Tensor, bits: int, n: int, version: int) -> torch.Tensor:
    """int16 [groups, N]. Of the first version one is added in each field, the carry going into the next."""
    if version == 1 and 32 % bits == 0:
        words = (words.long() + sum(1 << shift for shift in range(0, 32, bits))).int()
    zeros = unpack_bits(words, bits, n).short()
    return (zeros + 1) & ((1 << bits) - 1) if version == 1 and 32 % bits else zeros


def _awq(shards: Shards, stated: Quantization, module: str, bits: int, sizes: tuple[int, int, int]) -> Packed:
    k, n, groups = sizes
    where = shards.where(f"{module}{ENDING}")
    version = str(stated.settings.get("version") or stated.settings.get("format") or "gemm").lower()
    if version not in ("gemm", "awq", "gptq"):
        raise UnsupportedModel(f"{where} is laid out as AWQ {version[:40]}, which is not read ({stated.where})", REMEDY)
    group = _group(k, groups, stated, module)
    if group is None:
        raise misfit(where, f"has {groups} groups of scales for {k} inputs, which no group size makes")
    form = Form("int", bits, group, zeros=True)
    parts = tuple(f"{module}{ending}" for ending in (ENDING, ".qzeros", ".scales"))
    make = partial(_awq_grid, module=module, n=n, form=form)
    words = f"AWQ {bits} bits, {_group_words(group, k, _sizes(stated, module))}"
    return Packed(f"{module}.weight", (n, k), parts, words, form, make)


def _awq_grid(read: Read, module: str, n: int, form: Form) -> Grid:
    codes, zeros = (_awq_codes(read(f"{module}{ending}"), form.bits, n) for ending in (ENDING, ".qzeros"))
    scales = read(f"{module}.scales").T
    return Grid(form, codes.T.contiguous(), scales, zeros.T.short(), dtype=str(scales.dtype).removeprefix("torch."))


def _awq_codes(words: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """uint8 [rows, N] in the order of the outputs."""
    codes = unpack_bits(words, bits, words.shape[1] * 32 // bits)
    if bits == 4:
        codes = codes.reshape(len(codes), -1, 8)[:, :, list(_AWQ_ORDER)].reshape(len(codes), -1)
    return codes[:, :n]
