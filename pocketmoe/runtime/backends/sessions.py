"""The backend that needs nothing undocumented: a new session for each expert that is paged in.

It costs 1-15 ms of packing per page-in, which is why `slots` is preferred where its self-test passes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import ExpertId, StoreReader, padded
from pocketmoe.ort import Rows, Session, session_options
from pocketmoe.runtime.memory.budget import trim

_SESSION_BYTES = 160 * 1024  # a session's own bookkeeping, measured on onnxruntime 1.32


class SessionBackend:
    """Slots that hold a session each."""

    name = "sessions"

    def __init__(self, bundle: Bundle, store: StoreReader) -> None:
        self._store = store
        self._kinds = bundle.manifest.expert_kinds
        self._paths = [bundle.path(kind.graph) for kind in self._kinds]
        self._graphs = [path.read_bytes() for path in self._paths]

    def kind_of(self, expert: ExpertId) -> int:
        return self._store.records[expert].kind

    def slot_bytes(self, kind: int) -> int:
        # The record, which the session goes on using in part, and its packed copy (1.35 times the record for int4).
        return padded(self._kinds[kind].nbytes * 5 // 2) + _SESSION_BYTES

    def mapped_bytes(self, kind: int) -> int:  # noqa: ARG002 - a session's memory is all its own
        return 0

    def making_bytes(self) -> int:
        return 0

    def available_bytes(self) -> int:
        return sys.maxsize

    def make_slot(self, kind: int) -> SessionSlot:
        return SessionSlot(self._graphs[kind], self._paths[kind], self._store)

    def close(self) -> None:
        """Nothing outlives the slots."""


class SessionSlot:
    """One session, replaced at each load; its expert takes and gives float32 [rows, hidden]."""

    def __init__(self, graph: bytes, path: Path, store: StoreReader) -> None:
        self._graph = graph
        self._path = path
        self._store = store
        self._record = b""
        self._rows: Rows | None = None

    def load(self, expert: ExpertId) -> int:
        self._rows = None  # the old expert goes before the new one comes
        self._record = bytes(self._store.read(expert))
        self._rows = expert_from_record(self._graph, self._path, self._record)
        trim()
        return padded(len(self._record))

    def run(self, x: np.ndarray) -> np.ndarray:
        assert self._rows is not None, "a slot is run before it is loaded"
        return self._rows.run(x)

    def close(self) -> None:
        self._rows, self._record = None, b""


def expert_from_record(graph: bytes, path: Path, record: bytes) -> Rows:
    """A session of one expert, which uses in place what it does not pack: keep `record` as long as the session.

    `path`: of the graph, for errors. Raises GraphRefused, OverBudget.
    """
    options = session_options(threads=1)
    options.add_external_initializers_from_files_in_memory(["record"], [record], [len(record)])
    return Rows(Session(graph, options, path))
