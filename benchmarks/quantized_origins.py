"""Weights that the formats' own libraries packed, read by ours: how far what is read is from what they dequantize.

    python benchmarks/quantized_origins.py --json docs/quantized_origins.json

Needs, in an environment of their own: gptqmodel, autoawq, compressed-tensors, bitsandbytes, gguf; a library that is
missing, or cannot run here, leaves its rows out, and says so. `docs/generate_quantized.py` writes the page.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pocketmoe.export.packed.find import find_packed
from pocketmoe.export.tensors.directory import Directory
from pocketmoe.export.tensors.quantization import find_quantization
from pocketmoe.export.tensors.shards import Shards

N, K = 64, 256
Made = tuple[str, dict[str, Any], dict[str, torch.Tensor], torch.Tensor]  # label, settings, tensors, what they mean


def weight() -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.05


def grid(bits: int, symmetric: bool, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points, each [groups, N]."""
    levels, w = (1 << bits) - 1, weight()
    columns = [w[:, order == g] for g in range(int(order.max()) + 1)]
    if symmetric:
        scales = torch.stack([c.abs().amax(1) * 2 / levels for c in columns])
        return scales, torch.full_like(scales, (levels + 1) // 2)
    low = torch.stack([c.amin(1) for c in columns])
    scales = (torch.stack([c.amax(1) for c in columns]) - low) / levels
    return scales, (-low / scales).round().clamp(1, levels)


def gptqmodel() -> Iterator[Made]:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module

    for bits in (2, 3, 4, 8):
        for group, symmetric, acts, version in (
            (128, True, False, 1),
            (32, False, False, 2),
            (64, False, True, 1),
            (-1, True, False, 1),
        ):
            order = torch.arange(K) // (K if group < 0 else group)
            if acts:
                order = order[torch.randperm(K, generator=torch.Generator().manual_seed(1))]
            scales, zeros = grid(bits, symmetric, order)
            linear = torch.nn.Linear(K, N, bias=False)
            linear.weight.data = weight()
            module = TorchLinear(
                bits=bits,
                group_size=group,
                desc_act=acts,
                sym=symmetric,
                in_features=K,
                out_features=N,
                bias=False,
                register_buffers=True,
            )
            module.pack_original(linear, scales.T.contiguous(), zeros.T.contiguous(), order.to(torch.int32))
            if version == 1:
                convert_gptq_v2_to_v1_format_module(module, _Config(bits))
            tensors = {
                name: t.clone()
                for name, t in module.state_dict().items()
                if name in ("qweight", "qzeros", "scales", "g_idx")
            }
            if version == 1:
                convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
            module.eval()
            truth = super(TorchLinear, module).dequantize_weight().T.float()
            settings = {
                "quant_method": "gptq",
                "bits": bits,
                "group_size": group,
                "desc_act": acts,
                "sym": symmetric,
                "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
            }
            words = ["symmetric" if symmetric else "asymmetric", *(["act-order"] if acts else []), f"v{version}"]
            label = f"GPTQ {bits} bits, group {group}, {', '.join(words)}"
            yield label, settings, tensors, truth


class _Config:
    def __init__(self, bits: int) -> None:
        self.bits, self.pack_dtype = bits, torch.int32


def autoawq() -> Iterator[Made]:
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    for group in (128, 64, 32):
        scales, zeros = grid(4, False, torch.arange(K) // group)
        linear = torch.nn.Linear(K, N, bias=False)
        linear.weight.data = weight()
        module = WQLinear_GEMM.from_linear(linear.half(), 4, group, False, scales.half(), zeros.half())
        tensors = {name: getattr(module, name) for name in ("qweight", "qzeros", "scales")}
        truth = dequantize_gemm(module.qweight, module.qzeros, module.scales, 4, group).T.float()
        yield (
            f"AWQ 4 bits, group {group}",
            {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"},
            tensors,
            truth,
        )


def compressed_tensors() -> Iterator[Made]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    cases: list[tuple[str, dict[str, Any]]] = [
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 128}),
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}),
        ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 64}),
        ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("naive-quantized", {"num_bits": 8, "strategy": "group", "group_size": 64, "symmetric": False}),
        ("naive-quantized", {"num_bits": 8, "strategy": "tensor"}),
        ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
        ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
    ]
    for name, args in cases:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            w, found = weight().to(dtype), QuantizationArgs(**args)
            size = args.get("group_size", K)
            parts = w.reshape(1, -1) if args["strategy"] == "tensor" else w.reshape(N, -1, size)
            low, high = parts.amin(-1).float(), parts.amax(-1).float()
            whole = generate_gparam(w.min(), w.max()) if "nvfp4" in name else None
            scale, zero = calculate_qparams(low, high, found, **({"global_scale": whole} if whole is not None else {}))
            scheme = QuantizationScheme(targets=["Linear"], weights=found)
            state = {
                "weight": w,
                "weight_scale": scale.to(dtype if whole is None else scale.dtype),
                "weight_zero_point": zero,
            }
            if whole is not None:
                state["weight_global_scale"] = whole
            compressor = BaseCompressor.get_value_from_registry(name)
            packed = compressor.compress(state, scheme)
            truth = compressor.decompress(packed, scheme)["weight"].float()
            group = {"targets": ["Linear"], "weights": json.loads(found.model_dump_json())}
            settings = {"quant_method": "compressed-tensors", "format": name, "config_groups": {"group_0": group}}
            kept = {leaf: t for leaf, t in packed.items() if t is not None}
            yield f"{name} {_words(args)}, {str(dtype).removeprefix('torch.')}", settings, kept, truth


def _words(args: dict[str, Any]) -> str:
    group = f"group {args['group_size']}" if "group_size" in args else f"per {args['strategy']}"
    kind = "float" if args.get("type") == "float" else "int"
    return f"{kind}{args['num_bits']} {group}{'' if args.get('symmetric', True) else ', asymmetric'}"


def bitsandbytes() -> Iterator[Made]:
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant, int8_vectorwise_quant, quantize_4bit

    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                for block in (64, 128):
                    codes, state = quantize_4bit(
                        weight().to(dtype), blocksize=block, quant_type=kind, compress_statistics=nested
                    )
                    tensors = {"weight": codes} | {
                        f"weight.{name}": t for name, t in state.as_dict(packed=True).items()
                    }
                    label = f"{kind}, block {block}{', nested' if nested else ''}, {str(dtype).removeprefix('torch.')}"
                    yield (
                        label,
                        {"quant_method": "bitsandbytes", "load_in_4bit": True},
                        tensors,
                        dequantize_4bit(codes, state).float(),
                    )
    codes, scale, _ = int8_vectorwise_quant(weight().half())
    tensors = {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    yield "int8", {"quant_method": "bitsandbytes", "load_in_8bit": True}, tensors, int8_vectorwise_dequant(codes, scale)


LIBRARIES: dict[str, Callable[[], Iterator[Made]]] = {
    "gptqmodel": gptqmodel,
    "autoawq": autoawq,
    "compressed-tensors": compressed_tensors,
    "bitsandbytes": bitsandbytes,
}


def compare(made: Made) -> dict[str, Any]:
    label, settings, tensors, truth = made
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        save_file({f"layer.{name}": t.contiguous() for name, t in tensors.items()}, root / "model.safetensors")
        directory = Directory(root)
        shards = Shards(directory)
        packed = find_packed(shards, find_quantization({"quantization_config": settings}, directory))["layer.weight"]
        read = packed.make(shards.read)
        exact, found = read.numbers(slice(None)) * read.spread(read.scales.float()) * read.factor, read.dequantize()
    norm = truth.norm()
    return {
        "format": label,
        "equal": bool(torch.equal(found, truth)),
        "error": float((found - truth).norm() / norm),
        "unrounded": float((exact - truth).norm() / norm),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", action="append")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for library in arguments.only or LIBRARIES:
        try:
            for made in LIBRARIES[library]():
                row = {"library": library, "version": importlib.metadata.version(library), **compare(made)}
                rows.append(row)
                found = "equal" if row["equal"] else f"off by {row['error']:.1e}"
                print(f"{library:18} {row['format']:60} {found} ({row['unrounded']:.1e} unrounded)")
        except ImportError as error:
            print(f"{library}: not here ({error})", file=sys.stderr)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
