"""Batches for training, as a pure function of the step, so that a resumed run sees the same data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

KINDS = ("docs", "french", "prose", "python")


class Batches:
    """Equal numbers of windows of each kind per batch; drawn without replacement in each epoch."""

    def __init__(self, folder: Path, length: int, batch: int, seed: int) -> None:
        self.tokens = {k: np.load(folder / f"{k}.npy", mmap_mode="r", allow_pickle=False) for k in KINDS}
        self.length, self.per_kind, self.seed = length, batch // len(KINDS), seed
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def windows(self, kind: str) -> int:
        """How many whole windows (plus the next token as target) the kind has."""
        return (len(self.tokens[kind]) - 1) // self.length

    def _window(self, kind: str, position: int) -> np.ndarray:
        """The position-th window in the shuffled order: (length + 1,) tokens."""
        epoch, inside = divmod(position, self.windows(kind))
        key = (KINDS.index(kind), epoch)
        if key not in self._orders:
            generator = np.random.default_rng([self.seed, *key])
            self._orders[key] = generator.permutation(self.windows(kind))
        start = int(self._orders[key][inside]) * self.length
        return np.asarray(self.tokens[kind][start : start + self.length + 1], dtype=np.int64)

    def batch(self, step: int) -> torch.Tensor:
        """The batch of one step: (batch, length + 1) token ids; rows are grouped by kind."""
        first = step * self.per_kind
        rows = [self._window(kind, first + i) for kind in KINDS for i in range(self.per_kind)]
        return torch.from_numpy(np.stack(rows))

    def epochs(self, step: int) -> dict[str, float]:
        """How often each kind's text has been seen after ``step`` steps."""
        return {kind: round(step * self.per_kind / self.windows(kind), 3) for kind in KINDS}
