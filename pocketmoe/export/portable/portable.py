"""Bundle in, one ONNX model out: what any stock ONNX Runtime runs, from any language, without this package.

The segments are put back together, and where they were cut the experts of a layer come in, computed only when they
are routed to (`conditional`). The weights go to one file of external data beside the model: dense.bin as it is, then
the experts, one at a time. Nothing is paged: whoever runs the model needs memory for all of it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import onnx
import onnx_ir as ir

from pocketmoe import __version__
from pocketmoe.bundle.files import sha256_of
from pocketmoe.bundle.manifest import DENSE, ExpertKind, Manifest, State
from pocketmoe.bundle.partial import partial_directory
from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import ExpertId, StoreReader, padded, translate_write_errors
from pocketmoe.errors import BadInput, DamagedFile, OutputError, UnsupportedModel, first_line
from pocketmoe.export.portable.conditional import IfExperts, LayerExperts, QMoeExperts
from pocketmoe.export.portable.joined import PRODUCER, join, load
from pocketmoe.export.portable.qmoe import find_swiglu
from pocketmoe.system.files import sync

ExpertsOperator = Literal["if", "qmoe"]

INTERFACE = 1  # of inputs, outputs and metadata; docs/PORTABLE.md
_INTERFACE_KEY = f"{PRODUCER}.interface_version"
_COPY_BYTES = 8 << 20


@dataclass(frozen=True)
class Portable:
    """A portable model on disk. `experts`: the operators that compute experts, QMoE or If, and in how many layers."""

    model: Path
    data: Path
    nbytes: int
    experts: dict[str, int]


def export_portable(
    source: Path, target: Path, *, experts: ExpertsOperator = "if", progress: Progress = no_progress
) -> Portable:
    """Write the bundle `source` as the ONNX model `target` and one data file beside it, STEM-HASH.data.

    `experts`: "if" gives the bits of this package's own runtime; "qmoe" is QMoE where that computes a layer's experts
    in the same precision (it rounds otherwise, docs/PORTABLE.md), else If. In memory is one expert at a time.
    Both files appear whole or not at all, the model last; a portable model that was there before works until then, and
    its data file is removed after. Raises BadInput, DamagedFile, UnsupportedModel or OutputError.
    """
    bundle = Bundle.open(source)
    target = Path(os.path.abspath(target))  # noqa: PTH100 - Path.absolute keeps "..", which is no name
    if bundle.root.resolve() in target.resolve().parents:
        raise OutputError(f"{target} lies inside the bundle", "Name a file outside it.")
    old_data = _data_of_replaced(target)
    bundle.check_all_but_store()
    with ExitStack() as stack:
        with translate_write_errors(target):
            folder = stack.enter_context(partial_directory(target))
        store = stack.enter_context(bundle.open_store())
        layers = _plan(bundle, store, experts)
        unnamed = folder / "data"
        with translate_write_errors(target):
            _write_data(bundle, store, layers, unnamed, progress)
            progress("hashing", 0, 1)
            digest = sha256_of(unnamed)
            progress("hashing", 1, 1)
            data = unnamed.rename(folder / f"{target.stem}-{digest[:12]}.data")
            model = join(bundle, layers, data.name)
            model.metadata_props.update(_metadata(bundle.manifest, layers, data.name, digest))
            _save(model, folder / target.name)
            nbytes = data.stat().st_size + (folder / target.name).stat().st_size
            _data_of_replaced(target)  # again: hours may have passed
            _publish(folder / target.name, data, target, old_data)
    ops = [layer.op_type for layer in layers]
    return Portable(target, target.with_name(data.name), nbytes, {op: ops.count(op) for op in sorted(set(ops))})


def _plan(bundle: Bundle, store: StoreReader, wanted: ExpertsOperator) -> list[LayerExperts]:
    """How each layer's experts are computed, and where their weights go. Raises BadInput where QMoE fits none."""
    manifest = bundle.manifest
    graphs = [_load_expert(bundle, kind) for kind in manifest.expert_kinds]
    forms = [find_swiglu(graph) if wanted == "qmoe" else None for graph in graphs]
    layers: list[LayerExperts] = []
    end = padded(manifest.files[DENSE].nbytes) if manifest.dense else 0
    for index, layer in enumerate(manifest.moe_layers):
        numbers = [store.records[ExpertId(index, expert)].kind for expert in range(layer.n_experts)]
        form = forms[numbers[0]] if len(set(numbers)) == 1 else None
        if form is not None:
            layers.append(QMoeExperts(layer, manifest.expert_kinds[numbers[0]], form, end))
        else:
            kinds = [(manifest.expert_kinds[number], graphs[number]) for number in numbers]
            layers.append(IfExperts(layer, kinds, end))
        end = layers[-1].end
    if wanted == "qmoe" and all(layer.op_type == "If" for layer in layers):
        raise BadInput("QMoE does not compute what this bundle's experts do", "Leave --experts qmoe out.")
    return layers


def _load_expert(bundle: Bundle, kind: ExpertKind) -> ir.Model:
    """An expert's graph, whose weights lie in the record where the manifest says. Raises DamagedFile."""
    model = load(bundle.path(kind.graph))
    tensors = [value.const_value for value in model.graph.initializers.values()]
    found = {(t.name, t.offset, t.length) for t in tensors if isinstance(t, ir.ExternalTensor)}
    if found != {(t.name, t.offset, t.nbytes) for t in kind.tensors}:
        raise DamagedFile(bundle.path(kind.graph), "its weights are not those that the manifest lists")
    return model


def _write_data(
    bundle: Bundle, store: StoreReader, layers: Sequence[LayerExperts], path: Path, progress: Progress
) -> None:
    """dense.bin, then every expert's weights at their places."""
    with open(path, "wb") as file:
        if bundle.manifest.dense:
            with open(bundle.path(DENSE), "rb") as dense:
                while chunk := dense.read(_COPY_BYTES):
                    file.write(chunk)
        for done, expert in enumerate(store.records):
            progress("writing experts", done, len(store.records))
            for offset, data in layers[expert.layer].pieces(expert.expert, store.read(expert)):
                file.seek(offset)
                file.write(data)
        file.truncate(layers[-1].end)
        file.flush()
        os.fsync(file.fileno())
    progress("writing experts", len(store.records), len(store.records))


def _port(state: State) -> dict[str, Any]:
    """What is said of a state: a portable model makes the room for new tokens itself."""
    return {name: value for name, value in msgspec.to_builtins(state).items() if name != "with_room"}


def _metadata(manifest: Manifest, layers: Sequence[LayerExperts], data_file: str, data_sha256: str) -> dict[str, str]:
    """What the model's metadata_props say: where it comes from, what was done to it, how to run it. Values are text."""
    provenance, model = manifest.provenance, manifest.model
    interface = {
        "inputs": msgspec.to_builtins(manifest.inputs),
        "logits": manifest.logits,
        "states": [_port(state) for state in manifest.states],
        "hidden_size": model.hidden_size,
        "vocab_size": model.vocab_size,
        "context_length": model.context_length,
        "eos_token_ids": model.eos_token_ids,
        "bos_token_id": model.bos_token_id,
    }
    texts = {
        "interface_version": str(INTERFACE),
        "interface": json.dumps(interface),
        "data_file": data_file,
        "data_sha256": data_sha256,
        "experts": json.dumps([layer.op_type for layer in layers]),
        "architecture": model.architecture,
        "model_type": model.model_type,
        "n_parameters": str(model.n_parameters),
        "scheme": json.dumps([kind.scheme for kind in manifest.expert_kinds]),
        "bundle_sha256": manifest.sha256,
        "source": provenance.source,
        "revision": provenance.revision,
        "licence": provenance.licence,
        "base_model": provenance.base_model,
        "checkpoint_files": json.dumps(provenance.files),
        "tools": json.dumps({**provenance.tools, "pocketmoe (export-portable)": __version__}),
        "steps": json.dumps([*provenance.steps, "export-portable"]),
        "created": provenance.created,
        "notes": json.dumps(manifest.notes, ensure_ascii=False),
    }
    return {f"{PRODUCER}.{key}": text for key, text in texts.items() if text is not None}


def _save(model: ir.Model, path: Path) -> None:
    """Write the model and have onnx check it. Not with full_check, whose time grows with the square of the experts."""
    with open(path, "wb") as file:
        file.write(ir.to_proto(model).SerializeToString(deterministic=True))
        file.flush()
        os.fsync(file.fileno())
    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:
        raise UnsupportedModel(f"the segments do not make a valid model ({first_line(error, most=1000)})") from error


def _data_of_replaced(target: Path) -> Path | None:
    """The data file of the portable model at `target`; None where there is none. Raises OutputError for other files."""
    if not os.path.lexists(target):
        return None
    found: dict[str, str] = {}
    if target.is_file() and not target.is_symlink() and _may_be_ours(target):
        with suppress(Exception):  # onnx raises whatever the damage leads to
            found = {entry.key: entry.value for entry in onnx.load(target, load_external_data=False).metadata_props}
    if _INTERFACE_KEY not in found:
        raise OutputError(f"{target} exists and is no portable model", "Name another file, or move this one away.")
    name = found.get(f"{PRODUCER}.data_file", "")
    ours = re.fullmatch(re.escape(target.stem) + r"-[0-9a-f]{12}\.data", name)
    return target.with_name(name) if ours else None


def _may_be_ours(target: Path) -> bool:
    """The file begins as a model of ours does: a foreign one may be too large to look into."""
    with translate_write_errors(target), open(target, "rb") as file:
        return PRODUCER.encode() in file.read(32)


def _publish(model: Path, data: Path, target: Path, old_data: Path | None) -> None:
    """Put both files in their places, so that at any moment the model at `target` is whole."""
    new_data = target.with_name(data.name)
    was_there = new_data.exists()
    data.rename(new_data)
    try:
        sync(target.parent)
        model.rename(target)
    except BaseException:
        if not was_there:
            new_data.unlink()
        raise
    sync(target.parent)
    if old_data is not None and old_data != new_data:
        old_data.unlink(missing_ok=True)
