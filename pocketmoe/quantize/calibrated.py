"""What of a calibration goes into a bundle, and which experts it reached."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
from safetensors.numpy import save_file  # pyright: ignore[reportUnknownVariableType]

from pocketmoe.bundle.manifest import Manifest
from pocketmoe.bundle.store import ExpertId
from pocketmoe.calibration import CHANNELS, SUMMARY, Calibration, CalibrationSummary, ExpertSample

LEAST_TOKENS = 16  # with fewer an expert counts as unreached: what it saw says little of it
_NAMED = 8  # unreached experts in a note; the rest is in the summary


def reaching_sample(calibration: Calibration | None, expert: ExpertId) -> ExpertSample | None:
    """What calibration brought to an expert; None where that was nothing, or too little to go by."""
    if calibration is None:
        return None
    sample = calibration.of(expert)
    return sample if len(sample.x) >= LEAST_TOKENS else None


def write_calibration(calibration: Calibration, manifest: Manifest, root: Path) -> list[str]:
    """Write counts and mean squares of channels into a bundle's directory; notes on experts that were not reached."""
    n_experts = [layer.n_experts for layer in manifest.moe_layers]
    summary = calibration.summarize(n_experts)
    (root / SUMMARY).write_bytes(msgspec.json.encode(summary))
    save_file(_mean_squares(calibration, n_experts), root / CHANNELS)
    return _coverage(summary)


def _mean_squares(calibration: Calibration, n_experts: list[int]) -> dict[str, np.ndarray]:
    """By layer, of each channel of what each expert was given: float32 [experts, width], zeros where it saw nothing."""
    found: dict[str, np.ndarray] = {}
    for index, (layer, count) in enumerate(zip(calibration.layers, n_experts, strict=True)):
        rows = np.zeros((count, layer.x.shape[1]), np.float32)
        for expert in range(count):
            x = layer.of(expert).x
            if len(x):
                rows[expert] = np.square(x).mean(axis=0)
        found[f"layer_{index:02d}"] = rows
    return found


def _coverage(summary: CalibrationSummary) -> list[str]:
    unreached = summary.unreached(LEAST_TOKENS)
    total = sum(len(layer.tokens) for layer in summary.layers)
    if not unreached:
        return []
    names = "; ".join(f"layer {e.layer} expert {e.expert}" for e in unreached[:_NAMED])
    more = f" and {len(unreached) - _NAMED} more ({SUMMARY})" if len(unreached) > _NAMED else ""
    return [
        f"calibration brought {len(unreached)} of {total} experts fewer than {LEAST_TOKENS} tokens, and they were "
        f"quantized without it: {names}{more}"
    ]
