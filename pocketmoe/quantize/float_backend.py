"""Runs the experts of a float32 bundle for measuring: slots are plain buffers, and nothing is made anew for an expert.

A text for calibration goes through all experts a few times only. Packing them, or making a session of each whenever it
is read, takes longer than running it; here one session per kind and thread runs every expert, and reading is the limit.
"""

from __future__ import annotations

import mmap
import sys

import numpy as np

from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import ExpertId, StoreReader, padded
from pocketmoe.quantize.float_expert import FloatExpert


class FloatBackend:
    """A backend as `runtime.backends.protocol` describes it, by shape alone, for bundles whose experts are float32."""

    name = "floats"

    def __init__(self, bundle: Bundle, store: StoreReader) -> None:
        """Raises DamagedFile for a graph that is no expert's."""
        self._store = store
        self._kinds = [FloatExpert(bundle.path(kind.graph), kind) for kind in bundle.manifest.expert_kinds]

    def kind_of(self, expert: ExpertId) -> int:
        return self._store.records[expert].kind

    def slot_bytes(self, kind: int) -> int:
        return padded(self._kinds[kind].kind.nbytes)

    def mapped_bytes(self, kind: int) -> int:  # noqa: ARG002 - its buffers are the process's own
        return 0

    def making_bytes(self) -> int:
        return 0

    def available_bytes(self) -> int:
        return sys.maxsize

    def make_slot(self, kind: int) -> FloatSlot:
        return FloatSlot(self._kinds[kind], self._store)

    def close(self) -> None:
        """Nothing outlives the slots."""


class FloatSlot:
    """A buffer that experts of one kind are read into, one after the other."""

    def __init__(self, kind: FloatExpert, store: StoreReader) -> None:
        self._kind = kind
        self._store = store
        pages = mmap.mmap(-1, padded(kind.kind.nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._buffer = memoryview(pages)  # page-aligned, for direct reads
        self._weights = kind.weights(self._buffer)

    def load(self, expert: ExpertId) -> int:
        return self._store.read_into(expert, [self._buffer])

    def run(self, x: np.ndarray) -> np.ndarray:
        """y, float32 [rows, width], of the expert that was loaded last, for x, float32 [rows, width]."""
        return self._kind.run(self._weights, x)

    def close(self) -> None:
        """The buffer goes when nothing refers to it any more."""
        self._weights, self._buffer = {}, memoryview(b"")
