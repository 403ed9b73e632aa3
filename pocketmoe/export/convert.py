"""Checkpoint in, bundle out."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import onnx_ir as ir

from pocketmoe.bundle.manifest import STORE, Inputs, Manifest, Model, MoeLayer, Segment, State
from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.stream import ExpertSource, worker_pool, write_experts
from pocketmoe.bundle.writer import BundleWriter, list_files
from pocketmoe.coded import CodedSource
from pocketmoe.errors import BadInput, UnsupportedModel
from pocketmoe.export import card
from pocketmoe.export.checkpoint import config, gguf, provenance
from pocketmoe.export.checkpoint.checkpoint import Checkpoint
from pocketmoe.export.text import chat_template, generation, tokenizer

if TYPE_CHECKING:
    from pocketmoe.export.checkpoint.weights import Weights
    from pocketmoe.export.cut.coded import Coded


class Keeper(Protocol):
    """What can follow the export of a checkpoint that is quantized already, and keeps its codes (`quantize.apply`)."""

    def describe(self) -> str: ...

    def write(
        self, bundle: Bundle, source: ExpertSource, coded: CodedSource, writer: BundleWriter, progress: Progress
    ) -> Manifest: ...


class Quantizer(Protocol):
    """What can follow an export without a float32 bundle in between (`quantize.apply.Quantizer`)."""

    def describe(self) -> str:
        """One line with all that the quantized bytes depend on, but for the source."""
        ...

    def write(self, bundle: Bundle, source: ExpertSource, writer: BundleWriter, progress: Progress) -> Manifest:
        """Write every file but the manifest; return the manifest. `bundle` has no store."""
        ...


def export_checkpoint(
    source: Path,
    target: Path,
    *,
    quantizer: Quantizer | None = None,
    keeper: Keeper | None = None,
    must_keep: bool = False,
    run_its_code: bool = False,
    adapter: Path | None = None,
    progress: Progress = no_progress,
) -> Bundle:
    """Convert a checkpoint directory, or a GGUF file, into a bundle: float32, or what the quantizer makes of that.

    `keeper`: keeps the codes of weights that are quantized already, where there are any and no adapter changes them;
    `must_keep`: else refuse the checkpoint.

    The dense weights are mapped from a file, but for what graph fusions copy; of the experts there are two per core in
    memory. What a killed call with the same arguments left is gone on with; the bundle is the same.
    `run_its_code`: run Python code that comes with the checkpoint, where transformers does not know the model.
    `adapter`: the directory of a LoRA adapter that is merged into the weights as they are read.
    Raises BadInput, UnsupportedModel, DamagedFile or OutputError (and what the quantizer raises), each with one line
    for the user; then nothing is left behind, and a bundle that was at `target` before is untouched.
    """
    beside = next(folder for folder in Path(target).absolute().parents if folder.is_dir())
    progress("reading the checkpoint", 0, 1)
    with gguf.as_directory(Path(source), beside, progress) as root:
        checkpoint = Checkpoint(root, run_its_code, adapter)
        if keeper is not None and (not checkpoint.packed or checkpoint.adapter is not None):
            if must_keep:
                raise _nothing_to_keep(checkpoint)
            keeper = None
        return _export(checkpoint, target, keeper, quantizer, progress)


def _export(
    checkpoint: Checkpoint, target: Path, keeper: Keeper | None, quantizer: Quantizer | None, progress: Progress
) -> Bundle:
    follower = keeper or quantizer
    plan = provenance.plan(checkpoint, follower.describe() if follower else "as it is")
    with BundleWriter(target, plan, progress) as writer, provenance.Hashes(checkpoint) as hashes:
        if keeper is None and quantizer is None:
            manifest, experts, _ = _convert(checkpoint, writer.root, progress)
            hashes.start()
            manifest = _store(manifest, experts, writer, progress)
        else:
            with tempfile.TemporaryDirectory(dir=writer.root, prefix="draft") as directory:
                draft = Path(directory)
                manifest, experts, coded = _convert(checkpoint, draft, progress)
                hashes.start()
                bundle = Bundle(draft, msgspec.structs.replace(manifest, files=list_files(draft, {})))
                if keeper is not None:
                    coded.find_dense(draft, manifest.dense)
                    manifest = keeper.write(bundle, experts, coded, writer, progress)
                    manifest = _with_origin(checkpoint, manifest, _treatment(manifest, coded))
                    card.write(checkpoint, manifest, writer.root)
                else:
                    assert quantizer is not None
                    manifest = quantizer.write(bundle, experts, writer, progress)
        progress("hashing the checkpoint", 0, 1)
        origin = msgspec.structs.replace(manifest.provenance, files=hashes.result())
        checkpoint.check_unchanged()
        return writer.publish(msgspec.structs.replace(manifest, provenance=origin), progress)


def _treatment(manifest: Manifest, coded: CodedSource) -> str:
    """What became of a source's codes, for the reader."""
    experts = [kind.scheme for kind in manifest.expert_kinds]
    if {*experts, *(tensor.scheme for tensor in manifest.dense)} == {"fp32"}:
        return "dequantized"
    return "codes kept in part" if coded.left or any("fp32" in scheme for scheme in experts) else "codes kept"


def _with_origin(checkpoint: Checkpoint, manifest: Manifest, treatment: str) -> Manifest:
    """The manifest, which says how the source's weights were quantized and what became of that."""
    origin = f"{checkpoint.origin}, {treatment}" if checkpoint.origin else None
    return msgspec.structs.replace(manifest, provenance=msgspec.structs.replace(manifest.provenance, origin=origin))


def _nothing_to_keep(checkpoint: Checkpoint) -> BadInput:
    if checkpoint.adapter is not None and checkpoint.packed:
        return BadInput(
            f"{checkpoint.root}: its codes cannot be kept where an adapter changes the weights",
            "Choose a scheme that rounds them anew (--scheme int4), or leave out --scheme.",
        )
    return BadInput(
        f"{checkpoint.root} has no codes to keep: its weights are {checkpoint.origin or 'not quantized'}",
        "Choose a scheme (--scheme int4), or leave out --scheme for float32.",
    )


def _store(manifest: Manifest, experts: ExpertSource, writer: BundleWriter, progress: Progress) -> Manifest:
    """Write the experts as they are."""
    with worker_pool() as pool:
        written = write_experts(
            experts.kind_of, lambda expert: (experts.read(expert), 0.0), writer.root, pool, progress, "writing experts"
        )
    writer.hashes[STORE] = written.file_sha256
    return msgspec.structs.replace(manifest, store_index_sha256=written.index_sha256)


def _convert(checkpoint: Checkpoint, root: Path, progress: Progress) -> tuple[Manifest, ExpertSource, Coded]:
    """Write everything but the experts and the manifest; return the manifest, where experts come from, and codes."""
    from pocketmoe.export.checkpoint import weights
    from pocketmoe.export.cut.experts import prepare_experts

    (root / "graphs").mkdir(exist_ok=True)
    progress("checking the tokenizer", 0, 1)
    checked = tokenizer.write(checkpoint, root)
    progress("reading dense weights", 0, 1)
    model, source, experts = weights.load_model(checkpoint, root)
    generated = _generation(checkpoint, model)
    modules = list(experts.values())
    n_experts = [moe.n_experts for moe in modules]
    manifest = _write_graphs(checkpoint, model, experts, n_experts, root, progress)
    manifest = _with_origin(checkpoint, manifest, "dequantized")
    weights.release(model, modules)
    progress("checking one expert of each kind", 0, 1)
    kinds, reader, coded, equivalence = prepare_experts(modules, source, root)
    origin = msgspec.structs.replace(manifest.provenance, equivalence=equivalence)
    manifest = msgspec.structs.replace(manifest, expert_kinds=kinds, tokenizer=checked, provenance=origin)
    said = (*chat_template.remarks(checkpoint.root, root / tokenizer.DIRECTORY), *generated.notes)
    said = (*notes(checkpoint, source), *said)
    ends = msgspec.structs.replace(manifest.model, eos_token_ids=generated.eos_token_ids)
    manifest = msgspec.structs.replace(manifest, model=ends, sampling=generated.sampling, notes=said)
    card.write(checkpoint, manifest, root)
    return manifest, reader, coded


def _write_graphs(
    checkpoint: Checkpoint, model: Any, experts: dict[str, Any], n_experts: list[int], root: Path, progress: Progress
) -> Manifest:
    """Write the dense weights and the graphs that read them; return the manifest, the experts still missing."""
    from pocketmoe.export.capture.capture import capture, compute_shapes
    from pocketmoe.export.cut import dense, positions, prepare, segments

    progress("capturing the graph", 0, 1)
    try:
        captured = capture(model, experts)
    except UnsupportedModel:
        if not checkpoint.ran_code:
            config.check_computes(checkpoint.root / config.FILE, checkpoint.settings, compute_shapes)
        raise
    progress("cutting the graph", 0, 1)
    states = prepare.prepare(captured)
    pieces = segments.cut(captured)
    inputs = _inputs(captured.graph)
    positions.check_inputs(model, inputs)
    logits = str(captured.graph.outputs[0].name)
    roles = dense.find_roles(captured, logits)
    routers = [router for router in pieces.routers if router is not None]
    tensors = dense.write_dense([*pieces.segments, *routers], roles, root, progress)
    for piece in (*pieces.segments, *routers):
        ir.save(piece, root / _file(piece))
    return Manifest(
        model=_model(checkpoint, model),
        inputs=inputs,
        logits=logits,
        segments=tuple(_segment(piece) for piece in pieces.segments),
        moe_layers=tuple(
            _moe_layer(captured.graph, names, router, n)
            for names, router, n in zip(pieces.layers, pieces.routers, n_experts, strict=True)
        ),
        expert_kinds=(),
        states=tuple(_state(state) for state in states),
        dense=tensors,
        store_index_sha256="",
        provenance=provenance.describe(checkpoint),
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
        with_room=state.with_room,
    )


def _inputs(graph: ir.Graph) -> Inputs:
    from pocketmoe.export.cut import lengths

    used = {str(value.name) for value in graph.inputs if any(True for _ in value.uses())}
    if "input_ids" not in used:
        raise UnsupportedModel("the captured graph does not read token ids")
    return Inputs(
        positions=lengths.POSITIONS if lengths.POSITIONS in used else None,
        past_length=lengths.PAST_LENGTH if lengths.PAST_LENGTH in used else None,
        last_position=lengths.LAST_POSITION if lengths.LAST_POSITION in used else None,
    )


def _moe_layer(graph: ir.Graph, names: tuple[str, str, str, str], router: ir.Model | None, n: int) -> MoeLayer:
    x, ids, weights, output = names
    ids_value = next(v for node in graph for v in node.outputs if v.name == ids)
    assert ids_value.shape is not None
    return MoeLayer(
        n_experts=n,
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
    from pocketmoe.export.cut import positions

    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if not isinstance(context, int):
        raise UnsupportedModel(
            f"{checkpoint.root / 'config.json'} states no context length (max_position_embeddings)",
            "Add it to config.json.",
        )
    return Model(
        architecture=type(model).__name__,
        model_type=checkpoint.config.model_type,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        context_length=context,
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        bos_token_id=config.bos_token_id,
        computed_anew_beyond=positions.computed_anew_beyond(model),
    )


def _generation(checkpoint: Checkpoint, model: Any) -> generation.Generation:
    derived = model.generation_config.eos_token_id  # from config.json
    text_eos = model.config.get_text_config().eos_token_id
    return generation.read(checkpoint.root, text_eos if derived is None else derived)


def notes(checkpoint: Checkpoint, source: Weights) -> tuple[str, ...]:
    """What a user of the bundle should know of its making."""
    said = (*checkpoint.notes, *left_out(checkpoint, source.unused))
    if source.wrapper:
        said = (f"{source.wrapper} was taken away from the tensors' names", *said)
    if checkpoint.code_files():
        code = "Python code that came with the checkpoint was run to export it (--trust-remote-code)"
        said = (f"{code}: {', '.join(path.name for path in checkpoint.code_files())}", *said)
    return said


def left_out(checkpoint: Checkpoint, unused: list[str]) -> tuple[str, ...]:
    """What of the checkpoint is not in the bundle."""
    layers = getattr(checkpoint.config, "num_hidden_layers", 0)
    extra = [k for k in unused if "mtp" in k or ((m := re.search(r"\blayers\.(\d+)\.", k)) and int(m[1]) >= layers)]
    other = [k for k in unused if k not in set(extra) and not k.endswith("rotary_emb.inv_freq")]
    notes: list[str] = []
    if extra:
        notes.append(f"multi-token-prediction heads are left out ({len(extra)} tensors, such as {extra[0]})")
    if other:
        notes.append(f"{len(other)} tensors that the architecture does not use are left out, such as {other[0]}")
    return tuple(notes)
