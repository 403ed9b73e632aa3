"""Makes slots of experts of a given size in this process, and prints by how much its own memory grew: a test's child.

python -m tests.runtime.backends.slot_growth HIDDEN COUNT FOLDER
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np

from pocketmoe.bundle.store import ExpertId, StoreReader, StoreWriter
from pocketmoe.runtime.backends.packing import ExpertGraph, PackedExperts, StoredExperts, pack_into
from pocketmoe.runtime.backends.slots import SlotBackend, memory_scratch
from pocketmoe.runtime.memory.budget import return_freed_memory
from pocketmoe.runtime.memory.limits import read_limits
from tests.runtime.backends.make_probe import BLOCK, probe_model

_BEFORE = 10  # slots that are made before it counts


def own_bytes() -> int:
    """Anonymous memory of this process; not slots, which are shared."""
    (found,) = re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    return 1024 * int(found)


def record(hidden: int, rng: np.random.Generator) -> bytes:
    scales = rng.uniform(0.01, 0.03, (hidden, hidden // BLOCK)).astype(np.float32).tobytes()
    return (rng.bytes(hidden * hidden // 2) + scales) * 3


def main(hidden: int, count: int, folder: Path) -> None:
    return_freed_memory()  # as an engine does
    graph = folder / "expert.onnx"
    graph.write_bytes(probe_model(hidden).SerializeToString())
    data = record(hidden, np.random.default_rng(0))
    with StoreWriter(folder / "records.bin") as writer:
        for expert in range(count):
            writer.append(ExpertId(0, expert), 0, data)
        index_sha256 = writer.close()
    with memory_scratch() as scratch, StoreReader(folder / "records.bin", index_sha256) as store:
        experts = StoredExperts((ExpertGraph(graph, "x"),), store, index_sha256)
        packed = PackedExperts(folder, pack_into(folder, experts, scratch))
        backend = SlotBackend(packed, scratch, read_limits())
        made = [backend.make_slot(0) for _ in range(_BEFORE)]
        before, most = own_bytes(), 0
        for _ in range(count - _BEFORE):
            made.append(backend.make_slot(0))
            most = max(most, own_bytes() - before)
        claimed = backend.slot_bytes(0) - backend.mapped_bytes(0)
        sys.stdout.write(json.dumps({"grew": most, "claimed": claimed * (count - _BEFORE)}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
