"""What runs experts: a backend makes slots, and a slot holds one expert at a time.

    slots      the packed weights are a mapped file that is rewritten for each expert (`slots`)
    sessions   an ONNX Runtime session made anew for each expert, by public API only (`sessions`)

Both give the same bits. The in-memory twin in the tests is a third.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

from pocketmoe.bundle.store import ExpertId
from pocketmoe.errors import PocketMoEError

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

    def making_bytes(self) -> int:
        """Shared memory that is taken as long as slots can be made."""
        ...

    def room_bytes(self) -> int:
        """How much shared memory there is for slots, in bytes."""
        ...

    def make_slot(self, kind: int) -> Slot: ...

    def close(self) -> None: ...


def session_options(threads: int, **entries: str) -> ort.SessionOptions:
    """Options for one session of a token's path; `a__b` in an entry's name stands for `a.b`.

    Its threads spin while it runs, since most operators are done before a sleeping thread has woken up, and never
    between runs: whatever spins then takes a core from the experts and from the disk.
    No arena and no memory pattern: both keep peak-sized blocks that a budget cannot see.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.force_spinning_stop", "1")
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


class BoundRow:
    """A session's input and output for a single row, bound once: a decode step's call costs half as much so."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self._binding = session.io_binding()
        (source,), (target,) = session.get_inputs(), session.get_outputs()
        self._x = np.empty((1, *source.shape[1:]), np.float32)
        self._y = np.empty((1, *target.shape[1:]), np.float32)
        self._values = [ort.OrtValue.ortvalue_from_numpy(array) for array in (self._x, self._y)]
        self._binding.bind_ortvalue_input(source.name, self._values[0])
        self._binding.bind_ortvalue_output(target.name, self._values[1])

    def run(self, x: np.ndarray) -> np.ndarray:
        """y, float32 [1, hidden], for x, float32 [1, hidden]; valid until the next call."""
        np.copyto(self._x, x)
        self._session.run_with_iobinding(self._binding)
        return self._y
