"""Checkpoint in, bundle out."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import re
from pathlib import Path
from typing import Any

import onnx_ir as ir

from pocketmoe import __version__
from pocketmoe.bundle import Bundle, BundleWriter, Progress, no_progress
from pocketmoe.errors import UnsupportedModel
from pocketmoe.export import card, tokenizer
from pocketmoe.export.checkpoint import Checkpoint
from pocketmoe.manifest import Inputs, Manifest, Model, MoeLayer, Provenance, Segment, State

_TOOLS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "safetensors")
_STAGES = 3


def export_checkpoint(source: Path, target: Path, *, progress: Progress = no_progress) -> Bundle:
    """Convert a checkpoint directory into an unquantized (float32) bundle at `target`.

    The dense weights are in memory once or twice, the experts one at a time. Raises BadInput, UnsupportedModel,
    DamagedFile or OutputError, each with one line for the user; then nothing is left behind, and a bundle that was at
    `target` before is untouched.
    """
    with BundleWriter(target) as writer:
        checkpoint = Checkpoint(Path(source))
        tokenizer.write(checkpoint, writer.root)
        manifest = _convert(checkpoint, writer.root, progress)
        card.write(checkpoint, manifest, writer.root)
        checkpoint.check_unchanged()
        return writer.publish(manifest, progress)


def _convert(checkpoint: Checkpoint, root: Path, progress: Progress) -> Manifest:
    """Write everything but the manifest and the model card; return the manifest."""
    from pocketmoe.export import cut, dense, prepare, weights
    from pocketmoe.export.capture import capture
    from pocketmoe.export.experts import write_experts

    progress("loading dense weights", 0, _STAGES)
    model, source, experts = weights.load_model(checkpoint)
    modules = list(experts.values())
    progress("capturing the graph", 1, _STAGES)
    captured = capture(model, experts)
    progress("cutting the graph", 2, _STAGES)
    states = prepare.prepare(captured)
    pieces = cut.cut(captured)
    logits = str(captured.graph.outputs[0].name)
    roles = dense.find_roles(captured, logits)
    progress("cutting the graph", _STAGES, _STAGES)

    routers = [router for router in pieces.routers if router is not None]
    tensors = dense.write_dense([*pieces.segments, *routers], roles, root, progress)
    for piece in (*pieces.segments, *routers):
        ir.save(piece, root / _file(piece))
    kinds, index = write_experts(modules, source, root, progress)

    return Manifest(
        model=_model(checkpoint, model),
        inputs=_inputs(captured.graph),
        logits=logits,
        segments=tuple(_segment(piece) for piece in pieces.segments),
        moe_layers=tuple(
            _moe_layer(captured.graph, names, router, moe)
            for names, router, moe in zip(pieces.layers, pieces.routers, modules, strict=True)
        ),
        expert_kinds=kinds,
        states=tuple(_state(state) for state in states),
        dense=tensors,
        store_index_sha256=index,
        provenance=_provenance(checkpoint, progress),
        notes=left_out(checkpoint, source.unused),
    )


def _file(piece: ir.Model) -> str:
    return f"graphs/{piece.graph.name}.onnx"


def _segment(piece: ir.Model) -> Segment:
    return Segment(
        graph=_file(piece),
        inputs=tuple(str(value.name) for value in piece.graph.inputs),
        outputs=tuple(str(value.name) for value in piece.graph.outputs),
    )


def _state(state: Any) -> State:
    return State(
        input=state.input.name,
        output=state.output.name,
        dtype=state.input.dtype.numpy().name,
        shape=state.shape,
        growing_axis=state.growing_axis,
        in_place=state.in_place,
    )


def _inputs(graph: ir.Graph) -> Inputs:
    used = {str(value.name) for value in graph.inputs if any(True for _ in value.uses())}
    if "input_ids" not in used:
        raise UnsupportedModel("the captured graph does not read token ids")
    return Inputs(
        positions="position_ids" if "position_ids" in used else None,
        past_length="past_length" if "past_length" in used else None,
    )


def _moe_layer(graph: ir.Graph, names: tuple[str, str, str, str], router: ir.Model | None, moe: Any) -> MoeLayer:
    x, ids, weights, output = names
    ids_value = next(v for node in graph for v in node.outputs if v.name == ids)
    assert ids_value.shape is not None
    return MoeLayer(
        n_experts=moe.n_experts,
        top_k=_fixed(ids_value.shape[1]),
        x=x,
        expert_ids=ids,
        expert_weights=weights,
        output=output,
        router=None if router is None else _file(router),
    )


def _fixed(size: int | ir.SymbolicDim) -> int:
    if not isinstance(size, int):
        raise UnsupportedModel(f"the number of experts per token is not fixed ({size})")
    return size


def _model(checkpoint: Checkpoint, model: Any) -> Model:
    config = model.config.get_text_config()
    generation = model.generation_config
    context = getattr(config, "max_position_embeddings", None)
    if not isinstance(context, int):
        raise UnsupportedModel(
            f"{checkpoint.root / 'config.json'} states no context length (max_position_embeddings)",
            "Add it to config.json.",
        )
    eos = generation.eos_token_id if generation.eos_token_id is not None else config.eos_token_id
    return Model(
        architecture=type(model).__name__,
        model_type=checkpoint.config.model_type,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        context_length=context,
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        bos_token_id=config.bos_token_id,
    )


def _provenance(checkpoint: Checkpoint, progress: Progress) -> Provenance:
    files = list(checkpoint.files())
    hashes = {}
    for done, path in enumerate(files):
        progress("hashing the checkpoint", done, len(files))
        with open(path, "rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    progress("hashing the checkpoint", len(files), len(files))
    data = checkpoint.card_data
    base = data.get("base_model")
    licence = data.get("license")
    source, revision = _origin(checkpoint.root.resolve())
    return Provenance(
        source=source,
        revision=revision,
        licence=licence if isinstance(licence, str) else None,
        base_model=", ".join(map(str, base)) if isinstance(base, list) else str(base) if base else None,
        files=hashes,
        tools={"pocketmoe": __version__} | {name: importlib.metadata.version(name) for name in _TOOLS},
        steps=("export fp32",),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _origin(root: Path) -> tuple[str, str | None]:
    """Hub id and revision of a directory in the hub's cache, models--ORG--NAME/snapshots/REVISION; else its name."""
    repository = root.parent.parent.name
    if root.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/"), root.name
    return root.name, None


def left_out(checkpoint: Checkpoint, unused: list[str]) -> tuple[str, ...]:
    """What of the checkpoint is not in the bundle."""
    layers = getattr(checkpoint.config, "num_hidden_layers", 0)
    extra = [k for k in unused if "mtp" in k or ((m := re.search(r"\blayers\.(\d+)\.", k)) and int(m[1]) >= layers)]
    other = [k for k in unused if k not in set(extra) and not k.endswith("rotary_emb.inv_freq")]
    notes = []
    if extra:
        notes.append(f"multi-token-prediction heads are left out ({len(extra)} tensors, such as {extra[0]})")
    if other:
        notes.append(f"{len(other)} tensors that the architecture does not use are left out, such as {other[0]}")
    return tuple(notes)
