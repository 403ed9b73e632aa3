"""What getting a bundle takes before it can run: download, disk and time of the export. Estimates, and said to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketmoe.errors import PocketMoEError
from pocketmoe.jsonfile import is_object
from pocketmoe.profiles.estimate.classes import Machine, usual_cores
from pocketmoe.profiles.estimate.footprint import MIXED, Footprint
from pocketmoe.profiles.estimate.shapes import Shape, read_config

# Of `export --scheme int4-all` on two cores: 58 ns a parameter for sixteen layers of OLMoE's shape, 104 for
# Qwen3-30B-A3B's on a machine with other work (docs/LOG.md), and a capture that takes about a minute whatever the size.
_CPU_S_PER_PARAMETER = (115e-9, 210e-9)
_CAPTURE_S = (30.0, 120.0)
_MIXED_S_PER_LAYER = (120.0, 240.0)  # of CPU, for what each format costs each matrix
_WEIGHT_BITS: Mapping[str, float] = {"float32": 32, "float16": 16, "bfloat16": 16, "float8_e4m3fn": 8}
_PACKED_BITS: Mapping[str, float] = {"mxfp4": 4.25, "fp8": 8, "awq": 4.5, "gptq": 4.5, "bitsandbytes": 4.5}
_UNKNOWN_BITS = 16.0


@dataclass(frozen=True)
class Making:
    """Until a bundle is there. Seconds are of this device; another machine may do it, and the bundle be copied.

    `download_bytes`: 0 where the weights are here. `disk_bytes`: for the checkpoint and all that is made on the way.
    """

    scheme: str
    checkpoint_bytes: int
    download_bytes: int
    disk_bytes: int
    export_s_low: float
    export_s_high: float
    basis: str


def making_of(path: Path, shape: Shape, footprint: Footprint, machine: Machine) -> Making | None:
    """For a checkpoint or its config.json; None for a bundle, which is there already."""
    if shape.counted_from == "the bundle":
        return None
    here = sum(file.stat().st_size for file in _weights(path))
    expected, basis = _checkpoint_bytes(path, shape)
    read = here or expected
    cores = usual_cores(machine)
    each = [
        start + (shape.parameters * cost + (layer_s * shape.moe_layers if footprint.scheme == MIXED else 0)) / cores
        for start, cost, layer_s in zip(_CAPTURE_S, _CPU_S_PER_PARAMETER, _MIXED_S_PER_LAYER, strict=True)
    ]
    written = footprint.total_bytes
    if footprint.scheme == MIXED:  # quantize goes by a bundle of float32
        written += 4 * shape.parameters
    elif footprint.kv == "int8":
        written += footprint.total_bytes
    moving_s = (read + written) / machine.disk[-1][1]
    return Making(
        scheme=footprint.scheme,
        checkpoint_bytes=read,
        download_bytes=0 if here else expected,
        disk_bytes=read + written,
        export_s_low=max(each[0], moving_s),
        export_s_high=max(each[1], 2 * moving_s),
        basis="the files that are here" if here else basis,
    )


def _weights(path: Path) -> list[Path]:
    folder = path if path.is_dir() else path.parent
    return [file for file in folder.glob("*.safetensors") if file.is_file()]


def _checkpoint_bytes(path: Path, shape: Shape) -> tuple[int, str]:
    """What its weights take as they are published, by what its configuration says of them."""
    try:
        config = read_config(path)
    except PocketMoEError:  # it was read a moment ago
        return round(shape.parameters * _UNKNOWN_BITS / 8), "16 bits a weight assumed"
    method = _method(config)
    if method in _PACKED_BITS:
        dense = sum(shape.dense.values()) if method != "fp8" else 0
        bits = shape.routed_parameters * _PACKED_BITS[method] + dense * 16
        return round((bits if dense else shape.parameters * _PACKED_BITS[method]) / 8), f"config.json says {method}"
    name = str(config.get("dtype") or config.get("torch_dtype"))
    bits = _WEIGHT_BITS.get(name)
    return round(shape.parameters * (bits or _UNKNOWN_BITS) / 8), (
        f"config.json says {name}" if bits else "16 bits a weight assumed"
    )


def _method(config: Mapping[str, Any]) -> str:
    said = config.get("quantization_config")
    return str(said.get("quant_method")) if is_object(said) else ""
