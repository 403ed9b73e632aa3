"""Everything about a bundle that can be found wrong without running it: what `pocketmoe verify` does.

What passes is loaded and run without a refusal, but for what only shows when graphs compute.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnxruntime as ort

from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import PocketMoEError
from pocketmoe.ort import Session, session_options
from pocketmoe.runtime.backends.graph_checks import check_graphs
from pocketmoe.runtime.backends.packing import damage_in_packed
from pocketmoe.runtime.tokenizer import Text


def verify(bundle: Bundle, progress: Progress = no_progress) -> Iterator[str]:
    """Check every byte against its hash, and that tokenizer and graphs load; yield one line for each fault."""
    whole = True
    for damage in bundle.verify(progress):
        whole = False
        yield damage
    for damage in damage_in_packed(bundle):
        whole = False
        yield damage
    if not whole:
        return  # what is damaged need not be understood
    for check in (_check_text, check_graphs, _load_graphs):
        try:
            check(bundle)
        except PocketMoEError as fault:
            yield str(fault)
            return


def _check_text(bundle: Bundle) -> None:
    Text(bundle)


def _load_graphs(bundle: Bundle) -> None:
    """Have ONNX Runtime load every graph, as it is: nothing is folded, packed or computed. Raises GraphRefused."""
    manifest = bundle.manifest
    graphs = [segment.graph for segment in manifest.segments]
    graphs += [layer.router for layer in manifest.moe_layers if layer.router]
    options = _unchanged()
    for name in dict.fromkeys(graphs):
        Session(str(bundle.path(name)), options, bundle.path(name))
    with bundle.open_store() as store:
        first = {record.kind: expert for expert, record in reversed(store.records.items())}
        for number, expert in sorted(first.items()):
            path, record = bundle.path(manifest.expert_kinds[number].graph), bytes(store.read(expert))
            own = _unchanged()
            own.add_external_initializers_from_files_in_memory(["record"], [record], [len(record)])
            Session(path.read_bytes(), own, path)


def _unchanged() -> ort.SessionOptions:
    options = session_options(threads=1, session__disable_prepacking="1")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options
