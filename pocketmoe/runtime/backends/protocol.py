"""What runs experts: a backend makes slots, and a slot holds one expert at a time.

    slots      the packed weights are a mapped file that is rewritten for each expert (`slots`)
    sessions   an ONNX Runtime session made anew for each expert, by public API only (`sessions`)

Both give the same bits. `quantize.float_backend` and the in-memory twin of the tests are others; what all of them keep
is in tests/runtime/backends/test_contract.py.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from pocketmoe.bundle.store import ExpertId


class Slot(Protocol):
    """Holds one expert at a time. The pager never loads a slot while it runs."""

    def load(self, expert: ExpertId) -> int:
        """Fetch an expert's weights into the slot; return the bytes read from disk.

        Raises DamagedFile, after which the slot holds no expert and can be loaded again.
        """
        ...

    def run(self, x: np.ndarray) -> np.ndarray:
        """y, float32 [rows, hidden], for x, float32 [rows, hidden], by the expert that is loaded.

        Of a single row y is valid until the slot's next call.
        """
        ...

    def close(self) -> None:
        """Give its memory back to the system; it is not used any more. Any thread may, beside other slots' work."""
        ...


class Backend(Protocol):
    """Makes slots, and knows what one costs."""

    name: str

    def kind_of(self, expert: ExpertId) -> int:
        """The expert kind, which a slot must match."""
        ...

    def slot_bytes(self, kind: int) -> int:
        """Memory that one filled slot of that kind takes at most."""
        ...

    def mapped_bytes(self, kind: int) -> int:
        """How much of that is shared memory, which resident set size counts twice."""
        ...

    def making_bytes(self) -> int:
        """Shared memory that is taken as long as slots can be made."""
        ...

    def available_bytes(self) -> int:
        """How much shared memory there is for slots, those that there are included, in bytes."""
        ...

    def make_slot(self, kind: int) -> Slot:
        """A new slot; of those that are not closed at most one for each expert of the kind. Raises LimitReached."""
        ...

    def close(self) -> None:
        """Make no more slots; an expert that is loaded can still be run. Closing again does nothing."""
        ...
