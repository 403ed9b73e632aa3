"""The backend that needs nothing undocumented: a new session for each expert that is paged in.

It costs 1-15 ms of packing per page-in, which is why `slots` is preferred where its self-test passes.
"""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime as ort

from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import ExpertId, StoreReader, padded
from pocketmoe.runtime.backends.protocol import make_session, run_single, session_options
from pocketmoe.runtime.memory.budget import trim

_SESSION_BYTES = 160 * 1024  # a session's own bookkeeping, measured on onnxruntime 1.32


class SessionBackend:
    """Slots that hold a session each."""

    name = "sessions"

    def __init__(self, bundle: Bundle, store: StoreReader) -> None:
        self._store = store
        self._kinds = bundle.manifest.expert_kinds
        self._graphs = [bundle.path(kind.graph).read_bytes() for kind in self._kinds]

    def kind_of(self, expert: ExpertId) -> int:
        return self._store.records[expert].kind

    def slot_bytes(self, kind: int) -> int:
        # The record, which the session goes on using in part, and its packed copy (1.35 times the record for int4).
        return padded(self._kinds[kind].nbytes * 5 // 2) + _SESSION_BYTES

    def mapped_bytes(self, kind: int) -> int:  # noqa: ARG002 - a session's memory is all its own
        return 0

    def making_bytes(self) -> int:
        return 0

    def room_bytes(self) -> int:
        return sys.maxsize

    def make_slot(self, kind: int) -> SessionSlot:
        return SessionSlot(self._graphs[kind], self._kinds[kind].input, self._store)

    def close(self) -> None:
        """Nothing outlives the slots."""


class SessionSlot:
    """One session, replaced at each load."""

    def __init__(self, graph: bytes, input_name: str, store: StoreReader) -> None:
        self._graph = graph
        self._input = input_name
        self._store = store
        self._record = b""
        self._session: ort.InferenceSession | None = None

    def load(self, expert: ExpertId) -> int:
        self._session = None  # the old expert goes before the new one comes
        self._record = bytes(self._store.read(expert))
        self._session = session_from_record(self._graph, self._record)
        trim()
        return padded(len(self._record))

    def run(self, x: np.ndarray) -> np.ndarray:
        assert self._session is not None, "a slot is run before it is loaded"
        return run_single(self._session, {self._input: x})


def session_from_record(graph: bytes, record: bytes) -> ort.InferenceSession:
    """A session of one expert, which uses in place what it does not pack: keep `record` as long as the session."""
    options = session_options(threads=1)
    options.add_external_initializers_from_files_in_memory(["record"], [record], [len(record)])
    return make_session(graph, options)
