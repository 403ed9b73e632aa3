"""Do slots work with this CPU and this ONNX Runtime? Asked without a bundle, of two small experts made up here.

Their graph is `probe.onnx`, an int4 gated expert of hidden size 64 whose weights are not in the file
(tests/runtime/backends/make_probe.py makes it; the onnx package is not needed to run it).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pocketmoe.bundle.store import ExpertId, StoreReader, StoreWriter
from pocketmoe.runtime.backends.packing import ExpertGraph, PackedExperts, StoredExperts, pack_into
from pocketmoe.runtime.backends.slots import SlotsUnavailable, memory_scratch, self_test

GRAPH = Path(__file__).with_name("probe.onnx")
HIDDEN = 64
_MATRICES = 3
_BLOCKS = HIDDEN // 32  # per row


def probe_slots() -> str:
    """Pack two experts, swap one for the other, compare; why slots cannot be used here, or "" when they can."""
    try:
        with memory_scratch() as scratch:
            _swap(scratch)
    except SlotsUnavailable as reason:
        return str(reason)
    except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors have no common class; any of them means no slots
        return f"packing or swapping an expert failed ({error})"
    return ""


def _swap(scratch: Path) -> None:
    records = scratch / "records.bin"
    with StoreWriter(records) as writer:
        for expert in range(2):
            writer.append(ExpertId(0, expert), 0, probe_record(expert))
        index_sha256 = writer.close()
    with StoreReader(records, index_sha256) as store:
        experts = StoredExperts((ExpertGraph(GRAPH, "x"),), store, index_sha256)
        packed = PackedExperts(scratch, pack_into(scratch, experts, scratch))
        try:
            self_test(experts, packed, scratch)
        finally:
            packed.close()


def probe_record(seed: int) -> bytes:
    """The weights of one made-up expert, laid out as the graph has them: codes and scales of gate, up and down."""
    rng = np.random.default_rng(seed)
    parts: list[bytes] = []
    for _ in range(_MATRICES):
        parts.append(rng.bytes(HIDDEN * HIDDEN // 2))
        parts.append(rng.uniform(0.01, 0.03, (HIDDEN, _BLOCKS)).astype(np.float32).tobytes())
    return b"".join(parts)
