"""Tiny checkpoints whose weights are quantized already, packed as the formats' own documents and writers say.

Written from the published layouts and apart from the reader: element by element where that is bearable, and back the
other way. `benchmarks/quantized_origins.py` holds these makers and the reader against the formats' own libraries.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
LINEAR = ("_proj.weight", "lm_head.weight")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@dataclass(frozen=True)
class Quantized:
    """A weight in a format: its tensors by what follows the module's name, and the values that they stand for."""

    tensors: Tensors
    values: torch.Tensor  # float32 [N, K]


Quantize = Callable[[torch.Tensor], Quantized]


@dataclass(frozen=True)
class Origin:
    """A format: how a weight becomes it, what config.json says, and the words for the reader."""

    quantize: Quantize
    settings: dict[str, Any]
    words: str
    files: dict[str, Any] = field(default_factory=dict[str, Any])  # beside config.json


def pack_words(codes: np.ndarray, bits: int) -> torch.Tensor:
    """int32 [rows, ceil(n * bits / 32)] of codes [rows, n]: one long number a row, the first code lowest."""
    rows = []
    for row in codes.tolist():
        number = sum(int(code) << (bits * place) for place, code in enumerate(row))
        n_words = -(-len(row) * bits // 32)
        rows.append(np.frombuffer(number.to_bytes(4 * n_words, "little"), "<i4"))
    return torch.from_numpy(np.stack(rows).copy())


def integers(
    weight: torch.Tensor, bits: int, group: int, symmetric: bool, dtype: torch.dtype, index: torch.Tensor | None = None
) -> tuple[np.ndarray, torch.Tensor, np.ndarray, torch.Tensor]:
    """Codes [N, K], scales [N, groups], zero points [N, groups] and values [N, K] of W; `index`: each input's group."""
    n, k = weight.shape
    group = k if group < 0 else group
    index = torch.arange(k) // group if index is None else index
    groups, levels = int(index.max()) + 1, (1 << bits) - 1
    scales, zeros = torch.empty(n, groups), torch.empty(n, groups)
    for g in range(groups):
        part = weight[:, index == g]
        if symmetric:
            scales[:, g], zeros[:, g] = part.abs().amax(1) * 2 / levels, (levels + 1) // 2
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scales[:, g] = (high - low) / levels
            zeros[:, g] = (-low / scales[:, g]).round().clamp(1, levels)
    scales = scales.to(dtype)
    codes = (weight / scales.float()[:, index] + zeros[:, index]).round().clamp(0, levels)
    values = ((codes - zeros[:, index]).to(dtype) * scales[:, index]).float()
    return codes.numpy().astype(int), scales, zeros.numpy().astype(int), values


def gptq(
    bits: int, group: int, symmetric: bool = True, *, version: int = 1, act_order: bool = False,
    dtype: torch.dtype = torch.float16, index: str = "filled",
) -> Quantize:  # fmt: skip
    """`index`: filled, zeros or none: what g_idx is."""

    def quantize(weight: torch.Tensor) -> Quantized:
        k = weight.shape[1]
        order = torch.arange(k) // (k if group < 0 else group)
        if act_order:
            order = order[torch.randperm(k, generator=torch.Generator().manual_seed(k))]
        codes, scales, zeros, values = integers(weight, bits, group, symmetric, dtype, order)
        stored = zeros - 1 if version == 1 else zeros
        tensors = {
            "qweight": pack_words(codes, bits).T.contiguous(),
            "qzeros": pack_words(stored.T, bits),
            "scales": scales.T.contiguous(),
        }
        if index != "none":
            tensors["g_idx"] = (order if index == "filled" else torch.zeros(k)).to(torch.int32)
        return Quantized(tensors, values)

    return quantize


def awq(bits: int, group: int, dtype: torch.dtype = torch.float16) -> Quantize:
    def words(codes: np.ndarray) -> torch.Tensor:
        if bits == 4:
            codes = codes.reshape(len(codes), -1, 8)[:, :, list(AWQ_ORDER)].reshape(codes.shape)
        return pack_words(codes, bits)

    def quantize(weight: torch.Tensor) -> Quantized:
        codes, scales, zeros, values = integers(weight, bits, group, False, dtype)
        tensors = {"qweight": words(codes.T), "qzeros": words(zeros.T), "scales": scales.T.contiguous()}
        return Quantized(tensors, values)

    return quantize


def ct_packed(bits: int, group: int, symmetric: bool = True, dtype: torch.dtype = torch.bfloat16) -> Quantize:
    def quantize(weight: torch.Tensor) -> Quantized:
        codes, scales, zeros, values = integers(weight, bits, group, symmetric, dtype)
        tensors = {
            "weight_packed": pack_words(codes, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            tensors["weight_zero_point"] = pack_words(zeros.T, bits).T.contiguous()
        return Quantized(tensors, values)

    return quantize


def ct_octets(group: int, symmetric: bool = True, dtype: torch.dtype = torch.bfloat16) -> Quantize:
    def quantize(weight: torch.Tensor) -> Quantized:
        codes, scales, zeros, values = integers(weight, 8, group, symmetric, dtype)
        tensors = {"weight": torch.from_numpy(codes - 128).to(torch.int8), "weight_scale": scales}
        if not symmetric:
            tensors["weight_zero_point"] = torch.from_numpy(zeros - 128).to(torch.int8)
        return Quantized(tensors, values)

    return quantize


def _e2m1(weight: torch.Tensor, scales: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes two to an octet, and what they stand for before scaling."""
    levels = torch.tensor([*E2M1, *(-level for level in E2M1)])
    scaled = weight / scales.repeat_interleave(group, 1).clamp(min=1e-30)
    codes = (scaled[..., None] - levels).abs().argmin(-1).to(torch.uint8)
    return codes[:, ::2] | (codes[:, 1::2] << 4), levels[codes.long()]


def nvfp4(modelopt: bool) -> Quantize:
    def quantize(weight: torch.Tensor) -> Quantized:
        n = len(weight)
        largest = weight.reshape(n, -1, 16).abs().amax(-1)
        whole = 448 * 6 / weight.abs().max()
        scales = (largest / 6 * whole).to(torch.float8_e4m3fn)
        packed, levels = _e2m1(weight, scales.float() / whole, 16)
        if modelopt:
            scale = scales.float() * (1 / whole)
            values = levels * scale.repeat_interleave(16, 1)
            return Quantized({"weight": packed, "weight_scale": scales, "weight_scale_2": 1 / whole}, values)
        values = (levels * (scales.float() / whole).repeat_interleave(16, 1)).bfloat16().float()
        tensors = {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": whole.reshape(1)}
        return Quantized({**tensors, "input_global_scale": torch.ones(1)}, values)

    return quantize


def mxfp4(weight: torch.Tensor) -> Quantized:
    exponents = (weight.reshape(len(weight), -1, 32).abs().amax(-1) / 6).log2().ceil() + 127
    packed, levels = _e2m1(weight, 2.0 ** (exponents - 127), 32)
    values = levels * (2.0 ** (exponents - 127)).repeat_interleave(32, 1)
    return Quantized({"weight_packed": packed, "weight_scale": exponents.to(torch.uint8)}, values)


def bnb4(kind: str, block: int, nested: bool, dtype: torch.dtype = torch.bfloat16) -> Quantize:
    """By bitsandbytes itself, which the suite has."""

    def quantize(weight: torch.Tensor) -> Quantized:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        packed, state = quantize_4bit(weight.to(dtype), blocksize=block, quant_type=kind, compress_statistics=nested)
        values = dequantize_4bit(packed, state).float()
        tensors = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
        return Quantized({"weight": packed, **tensors}, values)

    return quantize


def bnb8(weight: torch.Tensor) -> Quantized:
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    codes, scale, _ = int8_vectorwise_quant(weight.half())
    tensors = {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return Quantized(tensors, int8_vectorwise_dequant(codes, scale))


def ct(format_: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    ignore = ["lm_head", "re:.*mlp.gate$"]
    return {"quant_method": "compressed-tensors", "format": format_, "ignore": ignore, "config_groups": {"g": group}}


def _gptq(bits: int, group: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": True, **more}


BF16 = torch.bfloat16
AUTO = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "packing_format": "auto_round"}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
ORIGINS: dict[str, Origin] = {
    "gptq 4 bits": Origin(gptq(4, 32), _gptq(4, 32), "GPTQ 4 bits, group 32"),
    "gptq 4 bits, asymmetric, v2": Origin(
        gptq(4, 16, False, version=2, dtype=BF16),
        _gptq(4, 16, sym=False, checkpoint_format="gptq_v2"),
        "GPTQ 4 bits, group 16",
    ),
    "gptq 8 bits": Origin(gptq(8, 32, False), _gptq(8, 32, sym=False), "GPTQ 8 bits, group 32"),
    "gptq 8 bits, per channel": Origin(gptq(8, -1), _gptq(8, -1), "GPTQ 8 bits, per channel"),
    "gptq 3 bits": Origin(gptq(3, 32, False), _gptq(3, 32, sym=False), "GPTQ 3 bits, group 32"),
    "gptq 2 bits": Origin(gptq(2, 16, False), _gptq(2, 16, sym=False), "GPTQ 2 bits, group 16"),
    "gptq act-order": Origin(
        gptq(4, 32, act_order=True), _gptq(4, 32, desc_act=True), "GPTQ 4 bits, group 32, act-order"
    ),
    "gptq without g_idx": Origin(gptq(4, 32, index="none"), _gptq(4, 32), "GPTQ 4 bits, group 32"),
    "gptq, g_idx of zeros": Origin(gptq(4, 32, index="zeros"), _gptq(4, 32), "GPTQ 4 bits, group 32"),
    "gptq, settings beside": Origin(
        gptq(4, 32), {}, "GPTQ 4 bits, group 32", {"quantize_config.json": {"bits": 4, "group_size": 32}}
    ),
    "auto-round": Origin(gptq(4, 32, False, version=2), AUTO, "auto-round (GPTQ) 4 bits, group 32"),
    "awq 4 bits": Origin(
        awq(4, 32), {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, "AWQ 4 bits, group 32"
    ),
    "awq 8 bits": Origin(awq(8, 32), {"quant_method": "awq", "bits": 8, "group_size": 32}, "AWQ 8 bits, group 32"),
    "compressed-tensors w4a16": Origin(
        ct_packed(4, 32), ct("pack-quantized", num_bits=4, group_size=32), "compressed-tensors int4, group 32"
    ),
    "compressed-tensors w4a16, asymmetric": Origin(
        ct_packed(4, 16, False, torch.float16),
        ct("pack-quantized", num_bits=4, group_size=16, symmetric=False),
        "compressed-tensors int4, group 16",
    ),
    "compressed-tensors w8a16": Origin(
        ct_packed(8, -1), ct("pack-quantized", num_bits=8, strategy="channel"), "compressed-tensors int8, per channel"
    ),
    "compressed-tensors int8": Origin(
        ct_octets(-1), ct("int-quantized", num_bits=8, strategy="channel"), "compressed-tensors int8, per channel"
    ),
    "compressed-tensors int8, groups": Origin(
        ct_octets(32, False), ct("naive-quantized", num_bits=8, group_size=32), "compressed-tensors int8, group 32"
    ),
    "nvfp4, compressed-tensors": Origin(
        nvfp4(False), ct("nvfp4-pack-quantized", num_bits=4, type="float"), "NVFP4 (compressed-tensors), group 16"
    ),
    "mxfp4, compressed-tensors": Origin(
        mxfp4, ct("mxfp4-pack-quantized", num_bits=4, type="float"), "MXFP4 (compressed-tensors), group 32"
    ),
    "nvfp4, modelopt": Origin(
        nvfp4(True), {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4 (ModelOpt), group 16"
    ),
    "bitsandbytes nf4": Origin(bnb4("nf4", 64, False), NF4, "bitsandbytes NF4, block 64"),
    "bitsandbytes nf4, nested": Origin(bnb4("nf4", 64, True), NF4, "bitsandbytes NF4, block 64, nested"),
    "bitsandbytes fp4": Origin(
        bnb4("fp4", 64, False, torch.float16), {**NF4, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes FP4, block 64"
    ),
    "bitsandbytes int8": Origin(
        bnb8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes LLM.int8(), per channel"
    ),
}


def quantize_checkpoint(source: Path, target: Path, twin: Path, origin: Origin) -> None:
    """Write `source`, a checkpoint of one safetensors file, in a format to `target`, and dequantized to `twin`."""
    tensors = load_file(source / "model.safetensors")
    stored, plain = dict(tensors), dict(tensors)
    for name in sorted(name for name in tensors if name.endswith(LINEAR)):
        quantized = origin.quantize(stored.pop(name))
        plain[name] = quantized.values
        stored |= {f"{name.removesuffix('weight')}{leaf}": t.contiguous() for leaf, t in quantized.tensors.items()}
    settings = json.loads((source / "config.json").read_text())
    for folder, found, more in ((target, stored, origin.settings), (twin, plain, {})):
        folder.mkdir(parents=True)
        for path in source.iterdir():
            if path.is_file() and path.name not in ("model.safetensors", "config.json"):
                (folder / path.name).write_bytes(path.read_bytes())
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
        changed = {**settings, **({"quantization_config": more} if more else {})}
        (folder / "config.json").write_text(json.dumps(changed))
    for name, value in origin.files.items():
        (target / name).write_text(json.dumps(value))
