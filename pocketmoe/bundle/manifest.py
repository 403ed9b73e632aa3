"""The manifest: what a bundle consists of, as typed records that are checked before anything is used.

A manifest seals itself: its first field is the SHA-256 of its own bytes (with that field as zeros).
Fields added later carry defaults; an unknown field or another format number is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import msgspec

from pocketmoe.bundle.store import ExpertId, Record
from pocketmoe.errors import DamagedFile

FORMAT = 1
MANIFEST = "manifest.json"
STORE = "experts.bin"
GRAPHS = "graphs/"
DENSE = f"{GRAPHS}dense.bin"

Size = Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
Role = Literal["embedding", "head", "attention", "shared_expert", "router", "norm", "other"]

# 94 layers of 45 dense tensors, with mixed precision and quantized caches, come to 1.5 MB; experts are not in it.
# A hostile one of this size takes at most 60 MB and half a second to read.
MAX_MANIFEST_BYTES = 4 << 20

_ITEM_BITS = {"bool": 8, "int4": 4, "uint4": 4, "bfloat16": 16, "float16": 16, "float32": 32, "float64": 64} | {
    f"{sign}int{bits}": bits for sign in ("", "u") for bits in (8, 16, 32, 64)
}
_STATE_DTYPES = {"float16", "float32", "float64", "bool", "int8", "uint8", "int32", "int64"}
# Control characters but tab and line feed, as bytes or as JSON escapes. Look for these in a text without its escaped
# backslashes, since in \\u0007 nothing is escaped but the backslash.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]|\\[bfr]|\\u00(?:0[0-8b-f]|1.|7f|[89].)", re.IGNORECASE)
_SEAL = b'{\n  "sha256": "'
_UNSEALED = b"0" * 64


def expert_graph(kind: int) -> str:
    """The name of the graph of that kind of expert."""
    return f"{GRAPHS}expert_{kind}.onnx"


class Tensor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tensor within an expert's record, in the order and under the name of the expert graph's initializers."""

    name: str
    dtype: str  # numpy's name: float32, uint8, ...
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class ExpertKind(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Experts that share one graph: y [rows, hidden] = graph(x [rows, hidden]), both float32.

    The graph's weights are external initializers in a file named `record`, at the offsets of `tensors`.
    """

    graph: str
    input: str
    output: str
    tensors: tuple[Tensor, ...]
    nbytes: int
    scheme: str = "fp32"


class MoeLayer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One MoE block. The names are values of the segments: what goes into the experts, and the name their sum gets."""

    n_experts: Size
    top_k: Size
    x: str  # float32 [tokens, hidden]
    expert_ids: str  # int64 [tokens, top_k]
    expert_weights: str  # float32 [tokens, top_k]
    output: str  # float32 [tokens, hidden], computed by the runtime
    router: str | None = None  # graph from x (input "x") to "expert_ids" and "expert_weights", for prefetch


class Segment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A graph between two MoE blocks. Segment i runs before MoE layer i; the last one yields the logits."""

    graph: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class State(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a token leaves behind for the next: a key or value cache, or a recurrent state.

    `shape` has -1 at `growing_axis`; without a growing axis the state has one size.
    `in_place`: input and output may be one buffer, longer than what is filled (GroupQueryAttention).
    `with_room`: the input is as long as the text with the new tokens, whose entries the graph writes; the output may be
    the same buffer. All axes before the growing one are 1, so that such a buffer may be the beginning of a longer one.
    """

    input: str
    output: str
    dtype: str
    shape: tuple[int, ...]
    growing_axis: int | None = None
    in_place: bool = False
    with_room: bool = False

    @property
    def buffered(self) -> bool:
        """Whether one buffer of the full size serves a text from its beginning to its end: no step copies it."""
        return self.in_place or self.with_room

    def nbytes(self, tokens: int) -> int:
        """Its size when it holds so many tokens."""
        sizes = (tokens if axis == self.growing_axis else size for axis, size in enumerate(self.shape))
        return math.prod(sizes) * _ITEM_BITS[self.dtype] // 8


class Inputs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The segments' inputs that do not come from another segment; None where the model has no use for it."""

    token_ids: str = "input_ids"  # noqa: S105 ; int64 [1, tokens]
    positions: str | None = "position_ids"  # int64 [1, tokens], 0, 1, 2, ... from the start of the text
    past_length: str | None = "past_length"  # int64 [1], tokens already in the states
    last_position: str | None = None  # int64 [1], of the last token being fed, also of those in later chunks


class DenseTensor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tensor in dense.bin."""

    name: str
    role: Role
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    scheme: str = "fp32"


class Model(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the runtime and the reader of `inspect` need to know of the model."""

    architecture: str  # transformers' class name
    model_type: str
    hidden_size: Size
    vocab_size: Annotated[int, msgspec.Meta(ge=1, lt=1 << 24)]  # the largest there is has 262,144
    context_length: Size
    n_parameters: int
    attention_heads: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)] = 0  # of one layer; 0 where unknown
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    # tokens; a text that grows beyond them is computed anew from its first token, as Phi's longrope wants it
    computed_anew_beyond: Size | None = None


_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the model's authors sample (generation_config.json), by transformers' names; None where they say nothing."""

    do_sample: bool | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=1e6)] | None = None
    top_k: _Count | None = None
    top_p: _Share | None = None
    min_p: _Share | None = None
    typical_p: _Share | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=1e6)] | None = None
    no_repeat_ngram_size: _Count | None = None
    max_new_tokens: Size | None = None
    pad_token_id: int | None = None


class Equivalence(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How experts' graphs were held against transformers' own forward at export, on random rows."""

    kinds: int  # of experts
    experts: int  # that were compared
    rows: int  # of each
    tolerance: float  # of a difference, as a share of the largest output
    error_below: float  # a power of ten that none reached


class Provenance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the weights come from and what was done to them, oldest step first."""

    source: str  # directory name or hub id
    revision: str | None = None
    licence: str | None = None
    licence_name: str | None = None  # of a licence that is none of the hub's own, which calls it "other"
    licence_link: str | None = None
    base_model: str | None = None
    origin: str | None = None  # how the source's weights were quantized, and what became of that; None: they were not
    datasets: tuple[str, ...] = ()
    files: dict[str, str] = {}  # the checkpoint's files, SHA-256
    tools: dict[str, str] = {}  # versions of what converted it
    steps: tuple[str, ...] = ()
    created: str = ""  # ISO 8601, UTC
    equivalence: Equivalence | None = None  # absent in bundles of older exports


class TokenizerCheck(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokenizer.json was held against transformers' own tokenizer of the checkpoint."""

    strings: int  # that gave the same ids and the same text again
    sha256: str  # of them and their ids
    made_by: str  # transformers' class
    versions: dict[str, str] = {}
    split_special_tokens: bool = False  # special tokens that a text holds are text; no tokenizer.json can say that


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    nbytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    sha256: str = _UNSEALED.decode()  # of the file with these 64 digits as zeros; must stay the first field
    format: int = FORMAT
    model: Model
    inputs: Inputs
    logits: str  # float32 [1, tokens, vocab], an output of the last segment
    segments: tuple[Segment, ...]
    moe_layers: tuple[MoeLayer, ...]
    expert_kinds: tuple[ExpertKind, ...]
    states: tuple[State, ...]
    dense: tuple[DenseTensor, ...]
    store_index_sha256: str
    provenance: Provenance
    tokenizer: TokenizerCheck | None = None  # None: of an export that did not check it
    sampling: Sampling | None = None  # the authors' defaults, for those commands that want them
    notes: tuple[str, ...] = ()  # what a user should know: parts of the checkpoint left out, experts never calibrated
    files: dict[str, FileEntry] = {}  # path relative to the bundle; filled by `BundleWriter.publish`


def seal(manifest: Manifest) -> bytes:
    """The bytes of manifest.json."""
    text = msgspec.json.format(
        msgspec.json.encode(msgspec.structs.replace(manifest, sha256=_UNSEALED.decode())), indent=2
    )
    assert text.startswith(_SEAL + _UNSEALED)
    return text.replace(_UNSEALED, hashlib.sha256(text).hexdigest().encode(), 1)


def read_manifest(path: Path) -> Manifest:
    """Read and check manifest.json. Raises DamagedFile."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise DamagedFile(path, f"cannot be read ({error.strerror})") from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise DamagedFile(path, f"has more than {MAX_MANIFEST_BYTES} bytes")
    start, end = len(_SEAL), len(_SEAL) + len(_UNSEALED)
    unsealed = data[:start] + _UNSEALED + data[end:]
    if not data.startswith(_SEAL) or hashlib.sha256(unsealed).hexdigest().encode() != data[start:end]:
        raise DamagedFile(path, "does not match its own hash")
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
        steers = _CONTROL.search(data.decode().replace("\\\\", ""))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        _refuse_other_format(path, data)
        raise DamagedFile(path, f"cannot be read ({error})") from error
    if manifest.format != FORMAT:
        _refuse_other_format(path, data)
    if steers:
        raise DamagedFile(path, "holds control characters, which could steer a terminal")
    _validate(path, manifest)
    return manifest


def _refuse_other_format(path: Path, data: bytes) -> None:
    """Raises DamagedFile for a manifest of another format, whose fields are not ours to judge."""
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        found = msgspec.json.decode(data, type=_FormatOnly).format
        if found != FORMAT:
            raise DamagedFile(path, f"has format {found}, this version reads {FORMAT}", "Install a matching version.")


class _FormatOnly(msgspec.Struct):
    format: int


def _validate(path: Path, manifest: Manifest) -> None:
    """The parts of the manifest agree with each other. Raises DamagedFile."""
    if len(manifest.segments) != len(manifest.moe_layers) + 1:
        raise DamagedFile(path, "must have one segment more than MoE layers")
    for name in manifest.files:
        safe_name(path, name)
    graphs = [segment.graph for segment in manifest.segments] + [kind.graph for kind in manifest.expert_kinds]
    graphs += [layer.router for layer in manifest.moe_layers if layer.router]
    for name in [STORE, *graphs, *([DENSE] if manifest.dense else [])]:
        if name not in manifest.files:
            raise DamagedFile(path, f"lists no file {name!r}, which it needs")
    for name in graphs:
        if not name.startswith(GRAPHS):
            raise DamagedFile(path, f"has a graph outside {GRAPHS}: {name!r}")
    _validate_sizes(path, manifest)
    _validate_wiring(path, manifest)


def _validate_sizes(path: Path, manifest: Manifest) -> None:
    """Counts, shapes and places are possible. Raises DamagedFile."""
    for i, layer in enumerate(manifest.moe_layers):
        if layer.top_k > layer.n_experts:
            raise DamagedFile(path, f"MoE layer {i} wants {layer.top_k} of {layer.n_experts} experts")
    for state in manifest.states:
        if state.dtype not in _STATE_DTYPES or not _possible_shape(state):
            raise DamagedFile(path, f"state {state.input!r} has an impossible shape or dtype")
    for kind in manifest.expert_kinds:
        _validate_tensors(path, kind.tensors, kind.nbytes)
    if manifest.dense:
        _validate_tensors(path, manifest.dense, manifest.files[DENSE].nbytes)


def _possible_shape(state: State) -> bool:
    sizes, axis = list(state.shape), state.growing_axis
    grows = axis is None or (0 <= axis < len(sizes) and sizes.pop(axis) == -1)
    if state.with_room and (state.in_place or axis is None or any(size != 1 for size in sizes[:axis])):
        return False  # the beginning of a longer buffer would not be one piece
    return grows and all(0 < size < 1 << 31 for size in sizes)


def _validate_wiring(path: Path, manifest: Manifest) -> None:
    """Whatever a segment or an MoE layer reads is there by then. Raises DamagedFile."""
    inputs = manifest.inputs
    known = {inputs.token_ids, inputs.positions, inputs.past_length, inputs.last_position}
    known |= {state.input for state in manifest.states}
    for i, segment in enumerate(manifest.segments):
        _refuse_unknown(path, {*segment.inputs} - known, segment.graph)
        if len({*segment.inputs}) < len(segment.inputs) or len({*segment.outputs}) < len(segment.outputs):
            raise DamagedFile(path, f"{segment.graph} reads or makes a value twice")
        known |= {*segment.outputs}
        if i < len(manifest.moe_layers):
            layer = manifest.moe_layers[i]
            _refuse_unknown(path, {layer.x, layer.expert_ids, layer.expert_weights} - known, f"MoE layer {i}")
            known.add(layer.output)
    _refuse_unknown(path, {manifest.logits, *(state.output for state in manifest.states)} - known, "the result")


def _refuse_unknown(path: Path, names: set[str], reader: str) -> None:
    if names:
        raise DamagedFile(path, f"{reader} reads {min(names)!r}, which nothing makes")


def _validate_tensors(path: Path, tensors: tuple[Tensor, ...] | tuple[DenseTensor, ...], end: int) -> None:
    """Tensors lie inside [0, end), do not overlap, and are as long as their shapes say. Raises DamagedFile."""
    last = 0
    for tensor in sorted(tensors, key=lambda t: t.offset):
        if tensor.offset < last or tensor.nbytes < 0 or any(n < 0 for n in tensor.shape):
            raise DamagedFile(path, f"tensor {tensor.name!r} has an impossible place")
        bits = _ITEM_BITS.get(tensor.dtype, 0)
        if len(tensor.shape) > 8 or not bits or tensor.nbytes != -(-math.prod(tensor.shape) * bits // 8):
            raise DamagedFile(path, f"tensor {tensor.name!r} cannot be {tensor.dtype!r} of that shape and length")
        last = tensor.offset + tensor.nbytes
    if last > end:
        raise DamagedFile(path, f"tensors end at byte {last} of {end}")


def safe_name(manifest_path: Path, name: str) -> str:
    """`name`, when it is a relative path that stays inside the bundle. Raises DamagedFile."""
    pure = PurePosixPath(name)
    leaves = pure.is_absolute() or ".." in pure.parts or str(pure) != name
    if leaves or name == "." or "\\" in name or not name.isprintable():
        raise DamagedFile(manifest_path, f"names a file outside the bundle: {name!r}")
    return name


def validate_index(manifest: Manifest, records: Mapping[ExpertId, Record], path: Path) -> None:
    """Every expert of every layer has a record, of a kind that exists and of that kind's size. Raises DamagedFile."""
    for layer, moe in enumerate(manifest.moe_layers):
        for expert in range(moe.n_experts):
            record = records.get(ExpertId(layer, expert))
            if record is None:
                raise DamagedFile(path, f"has no record of layer {layer}, expert {expert}")
            if record.kind >= len(manifest.expert_kinds) or record.nbytes != manifest.expert_kinds[record.kind].nbytes:
                raise DamagedFile(path, f"the record of layer {layer}, expert {expert} has the wrong kind or size")
    if len(records) != sum(moe.n_experts for moe in manifest.moe_layers):
        raise DamagedFile(path, "has records of experts that the model does not have")
