"""What runs experts: a backend makes slots, and a slot holds one expert at a time.

    slots      the packed weights are a mapped file that is rewritten for each expert (`slots`)
    sessions   an ONNX Runtime session made anew for each expert, by public API only (`sessions`)

Both give the same bits. The in-memory twin in the tests is a third.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

from pocketmoe.errors import PocketMoEError
from pocketmoe.store import ExpertId

CPU = "CPUExecutionProvider"


class Slot(Protocol):
    """Room for one expert. Never loaded while it runs: the pager sees to that."""

    def load(self, expert: ExpertId) -> int:
        """Fetch an expert's weights into the slot; return the bytes read from disk. Raises DamagedFile."""
        ...

    def run(self, x: np.ndarray) -> np.ndarray:
        """y, float32 [rows, hidden], for x, float32 [rows, hidden], by the expert that is loaded."""
        ...


class Backend(Protocol):
    """Makes slots, and knows what one costs."""

    name: str

    def kind_of(self, expert: ExpertId) -> int:
        """The expert kind, which a slot must match."""
        ...

    def slot_bytes(self, kind: int) -> int:
        """Memory that one filled slot of that kind takes."""
        ...

    def mapped_bytes(self, kind: int) -> int:
        """How much of that is shared memory, which resident set size counts twice."""
        ...

    def room_bytes(self) -> int:
        """How much shared memory there is for slots, in bytes."""
        ...

    def make_slot(self, kind: int) -> Slot: ...

    def close(self) -> None: ...


def session_options(threads: int, **entries: str) -> ort.SessionOptions:
    """Options for one session of a token's path; `a__b` in an entry's name stands for `a.b`.

    No arena and no memory pattern: both keep peak-sized blocks that a budget cannot see.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for name, value in entries.items():
        options.add_session_config_entry(name.replace("__", "."), value)
    return options


def make_session(model: str | bytes, options: ort.SessionOptions) -> ort.InferenceSession:
    """A session on the CPU, checked to be there and nowhere else. Raises PocketMoEError."""
    session = ort.InferenceSession(model, options, providers=[CPU])
    if session.get_providers() != [CPU]:
        raise PocketMoEError(f"ONNX Runtime put a session on {session.get_providers()} instead of {CPU}")
    return session


def run_single(session: ort.InferenceSession, feed: dict[str, Any]) -> np.ndarray:
    """The only output of a session."""
    (output,) = session.run(None, feed)
    assert isinstance(output, np.ndarray)
    return output
