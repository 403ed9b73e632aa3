"""How large the numbers in key and value caches get: what their quantization is calibrated by."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import BadInput
from pocketmoe.profiles.calibration.calibrate import WINDOW, modest, sha256_of_text, text_windows
from pocketmoe.profiles.quality.quality import Slice
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.options import EngineOptions

_WINDOWS = 8


@dataclass(frozen=True)
class CacheRanges:
    """The largest magnitudes found, by the name of a state's input: float32 [heads, head size]."""

    ranges: dict[str, np.ndarray]
    tokens: int
    text_sha256: str

    @property
    def source(self) -> str:
        """One line: 4096 tokens of text 1a2b3c4d5e6f."""
        return f"{self.tokens} tokens of text {self.text_sha256[:12]}"


def measure_cache_ranges(
    bundle: Bundle,
    names: Collection[str],
    slices: Sequence[Slice],
    *,
    options: EngineOptions | None = None,
    windows: int = _WINDOWS,
    progress: Progress = no_progress,
) -> CacheRanges:
    """Run some windows of text, taken evenly from all of it, and look at the states in `names`, [1, heads, tokens, n].

    `options`: by default `modest`; the capacity in them is replaced by a window's. Raises BadInput for too short a text
    and for caches that are not finite, and what opening and running an engine raises.
    """
    window = min(WINDOW, bundle.manifest.model.context_length)
    chosen = text_windows(bundle, slices, windows * window)
    ranges: dict[str, np.ndarray] = {}
    with Engine(bundle, replace(options or modest(bundle), capacity=window), progress) as engine:
        for done, piece in enumerate(chosen):
            progress("calibrating", done, len(chosen))
            engine.reset()
            engine.feed(piece, rows="none")
            for name in names:
                largest = np.abs(engine.sequences[0].state(name)).max(axis=(0, 2))
                ranges[name] = np.maximum(largest, ranges[name]) if name in ranges else largest
    progress("calibrating", len(chosen), len(chosen))
    if not all(np.isfinite(largest).all() for largest in ranges.values()):
        raise BadInput(f"{bundle.root}: caches hold numbers that are not finite", "Export it again.")
    return CacheRanges(ranges, sum(map(len, chosen)), sha256_of_text(slices))
