"""Routing traces: which experts each token was routed to. Recorded only when asked for, since a trace reveals the text.

A trace is two files. NAME is a .npy array, int16 [tokens, MoE layers, experts per token], -1 where a layer has fewer;
NAME.json says what a replay needs beside it: the experts of each layer, how the prompt was cut up, and what a
slot, a read and everything else took on the machine that recorded. An array alone can be replayed too.

Expert ids alone reconstruct 91% of the tokens (arXiv 2602.04105).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import secrets
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import TYPE_CHECKING, Annotated, BinaryIO, Self

import msgspec
import numpy as np

from pocketmoe.bundle.files import read_whole
from pocketmoe.bundle.manifest import MoeLayer
from pocketmoe.bundle.store import ExpertId, translate_write_errors
from pocketmoe.errors import DamagedFile
from pocketmoe.runtime.engine.claims import SLOTS
from pocketmoe.runtime.engine.memory_plan import ModelSizes

if TYPE_CHECKING:
    from pocketmoe.runtime.engine.engine import Engine

FORMAT = 1
MAX_TRACE_BYTES = 1 << 30
_MAX_EXPERTS = 1 << 20  # of all layers together
_MAX_LAYER_EXPERTS = 1 << 15  # what int16 can name
_MAX_INFO_BYTES = 16 << 20
_REMEDY = "Record it again: pocketmoe run BUNDLE --trace FILE."

# What a hostile header makes NumPy's parser raise, which tokenizes and evaluates literals.
_UNREADABLE = (ValueError, EOFError, TypeError, SyntaxError, TokenError, MemoryError, RecursionError)

_Count = Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
_Bytes = Annotated[int, msgspec.Meta(ge=0, lt=1 << 50)]


class PoolInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Experts of one size: what a miss reads and a slot takes, in bytes, and how many slots the recording run had."""

    read_bytes: _Bytes
    slot_bytes: _Bytes
    slots: _Count


class TraceInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """NAME.json. `pool_of`: each expert's pool, by layer; empty where there is one pool."""

    format: int = FORMAT
    sha256: str  # of the array's data, without the .npy header
    architecture: str
    bundle_sha256: str  # the manifest's own
    experts: tuple[_Count, ...]  # of each MoE layer
    prompt_walks: tuple[_Count, ...]  # tokens of each batch of the prompt's chunks; those after them came singly
    pools: tuple[PoolInfo, ...]
    pool_of: tuple[tuple[int, ...], ...] = ()
    fixed_bytes: _Bytes  # of the recording process: everything but the slots
    loading_bytes: _Bytes  # what loading takes before there are slots, in memory that these take later


@dataclass(frozen=True)
class Trace:
    """Expert ids, int16 [tokens, layers, top_k], -1 for none; distinct within a token and layer, and of that layer.

    `info` is None for an array without its .json; then every layer is taken to have the experts up to the highest seen.
    """

    ids: np.ndarray
    experts: tuple[int, ...]
    prompt_walks: tuple[int, ...]
    info: TraceInfo | None = None


def info_path(path: Path) -> Path:
    """Where the rest of a trace lies."""
    return path.with_name(f"{path.name}.json")


class TraceWriter:
    """Takes the routes of a run as they come and keeps only those of one batch of chunks in memory; a context manager.

    Nothing is at `path` before `publish`, and nothing is left where the run fails.
    """

    def __init__(self, path: Path, layers: Sequence[MoeLayer], prompt_tokens: int) -> None:
        """Raises OutputError where `path` cannot be written. Tokens beyond `prompt_tokens` are answers."""
        self._path = path
        self._shape = (len(layers), max(layer.top_k for layer in layers))
        self._prompt_left = prompt_tokens
        self._batch: list[list[np.ndarray]] = [[] for _ in layers]  # for each layer, its chunks so far
        self._digest = hashlib.sha256()
        self.tokens = 0
        self.prompt_walks: list[int] = []
        with translate_write_errors(path):
            if path.is_dir():  # "." and "/", which have no name, among them
                raise IsADirectoryError(21, "it is a directory")
            self._partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
            self._file: BinaryIO = open(self._partial, "xb", opener=_private)  # noqa: SIM115 - `__exit__` closes it
            self._write_header()

    def __call__(self, layer: int, expert_ids: np.ndarray) -> None:
        """Note what a layer's router chose for a chunk, int [tokens, top_k].

        In a batch the layers come in order, each with all of the batch's chunks.
        """
        self._batch[layer].append(expert_ids.astype(np.int16))
        if layer == self._shape[0] - 1 and len(self._batch[layer]) == len(self._batch[0]):
            self._end_batch()

    def _end_batch(self) -> None:
        batch = [np.concatenate(chunks) for chunks in self._batch]
        ids = np.full((len(batch[0]), *self._shape), -1, "<i2")
        for layer, chosen in enumerate(batch):
            ids[:, layer, : chosen.shape[1]] = chosen
            self._batch[layer].clear()
        with translate_write_errors(self._path):
            self._file.write(ids.data)
        self._digest.update(ids.data)
        self.tokens += len(ids)
        if self._prompt_left > 0:
            self.prompt_walks.append(len(ids))
            self._prompt_left -= len(ids)

    def publish(self, info: TraceInfo) -> None:
        """Put both files in place; the hash in `info` is filled in here. Raises OutputError."""
        info = msgspec.structs.replace(info, sha256=self._digest.hexdigest(), prompt_walks=tuple(self.prompt_walks))
        beside = self._partial.with_suffix(".json-partial")
        with translate_write_errors(self._path):
            self._file.seek(0)
            self._write_header()
            self._sync(self._file)
            try:
                with open(beside, "xb", opener=_private) as file:
                    file.write(msgspec.json.encode(info))
                    self._sync(file)
                beside.replace(info_path(self._path))
                self._partial.replace(self._path)
            finally:
                beside.unlink(missing_ok=True)

    def _write_header(self) -> None:
        """NumPy leaves room in it for the first axis to grow, so that its length is the same every time."""
        described = {"descr": "<i2", "fortran_order": False, "shape": (self.tokens, *self._shape)}
        np.lib.format.write_array_header_1_0(self._file, described)

    @staticmethod
    def _sync(file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())
        file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self._file.close()
        self._partial.unlink(missing_ok=True)


def _private(path: str, flags: int) -> int:
    """Others of this machine have no business with the text."""
    return os.open(path, flags, 0o600)


def describe(engine: Engine) -> TraceInfo:
    """What a replay needs beside the ids, as this run found it; hash and chunks are left to `TraceWriter.publish`.

    Where there are several kinds of experts, slots and reads are taken to cost in proportion to their records.
    """
    manifest, opened, stats = engine.bundle.manifest, engine.opened, engine.stats
    kinds = sorted(opened.slots)
    record = {kind: manifest.expert_kinds[kind].nbytes for kind in kinds}
    slot_claim = engine.budget.claims[SLOTS]
    per_slot_byte = slot_claim / sum(opened.slots[kind] * record[kind] for kind in kinds)
    mean_record = sum(opened.experts[kind] * record[kind] for kind in kinds) / sum(opened.experts.values())
    per_read_byte = (stats.bytes_read - stats.bytes_prefetched) / stats.misses / mean_record if stats.misses else 1.0
    with engine.bundle.open_store() as store:
        kind_of = {record.id: record.kind for record in store.records.values()}
    experts = tuple(layer.n_experts for layer in manifest.moe_layers)
    rows = (tuple(kinds.index(kind_of[ExpertId(layer, e)]) for e in range(n)) for layer, n in enumerate(experts))
    return TraceInfo(
        sha256="",
        architecture=manifest.model.architecture,
        bundle_sha256=manifest.sha256,
        experts=experts,
        prompt_walks=(),
        pools=tuple(
            PoolInfo(
                read_bytes=round(per_read_byte * record[kind]),
                slot_bytes=round(per_slot_byte * record[kind]),
                slots=opened.slots[kind],
            )
            for kind in kinds
        ),
        pool_of=tuple(rows) if len(kinds) > 1 else (),
        fixed_bytes=engine.budget.claimed_bytes - slot_claim,
        loading_bytes=ModelSizes.of(manifest).loading_bytes,
    )


def read_trace(path: Path) -> Trace:
    """Read and check a trace. Raises BadInput for what cannot be read, DamagedFile for anything that is no trace."""
    ids, data = _read_array(path)
    beside = info_path(path)
    info = _read_info(beside) if os.path.lexists(beside) else None
    if info is not None:
        _check_info(info_path(path), info, ids.shape, hashlib.sha256(data).hexdigest())
    experts = info.experts if info else (int(ids.max()) + 1,) * ids.shape[1]
    _check_ids(path, ids, experts)
    return Trace(ids.astype(np.int16), experts, info.prompt_walks if info else (), info)


def _read_array(path: Path) -> tuple[np.ndarray, memoryview]:
    """The array and its bytes; nothing is allocated before its size is known to be that of the file."""
    whole = read_whole(path, MAX_TRACE_BYTES, _REMEDY)
    file = io.BytesIO(whole)
    shape, dtype = _read_header(path, file)
    wanted = dtype.itemsize
    for length in shape:
        wanted *= length
    data = memoryview(whole)[file.tell() :]
    if len(data) != wanted:
        raise DamagedFile(path, f"holds {len(data)} bytes of expert ids, its header promises {wanted}", _REMEDY)
    return np.frombuffer(data, dtype).reshape(shape), data


def _read_header(path: Path, file: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype, when they can be those of a trace; what NumPy only warns of is refused too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("not version 1.0")
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    except (*_UNREADABLE, Warning) as error:
        raise DamagedFile(path, "is not a .npy file", _REMEDY) from error
    possible = dtype.kind in "iu" and not fortran_order and len(shape) == 3 and all(0 < n < 1 << 31 for n in shape)
    if not possible:
        raise DamagedFile(path, "is no array of integers [tokens, MoE layers, experts per token]", _REMEDY)
    return shape, dtype


def _read_info(path: Path) -> TraceInfo:
    data = read_whole(path, _MAX_INFO_BYTES, _REMEDY)
    try:
        info = msgspec.json.decode(data, type=TraceInfo)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedFile(path, f"cannot be read ({error})", _REMEDY) from error
    if not info.architecture.isprintable():
        raise DamagedFile(path, "holds control characters, which could steer a terminal", _REMEDY)
    if info.format != FORMAT:
        raise DamagedFile(path, f"has format {info.format}, this version reads {FORMAT}", "Install a matching version.")
    return info


def _check_info(path: Path, info: TraceInfo, shape: Sequence[int], sha256: str) -> None:
    """It belongs to the array and agrees with itself. Raises DamagedFile."""
    if info.sha256 != sha256:
        raise DamagedFile(path, "belongs to another trace: the hash of the expert ids differs", _REMEDY)
    if len(info.experts) != shape[1] or sum(info.prompt_walks) > shape[0] or not info.pools:
        raise DamagedFile(path, f"does not fit {shape[0]} tokens in {shape[1]} layers", _REMEDY)
    if info.pool_of and [len(row) for row in info.pool_of] != [*info.experts]:
        raise DamagedFile(path, "does not say of every expert which pool it is in", _REMEDY)
    if ({pool for row in info.pool_of for pool in row} or {0}) != {*range(len(info.pools))}:
        raise DamagedFile(path, "describes other pools than its experts are in", _REMEDY)


def _check_ids(path: Path, ids: np.ndarray, experts: Sequence[int]) -> None:
    """Every id is one of its layer's experts or -1, and no token has one twice. Raises DamagedFile."""
    if sum(experts) > _MAX_EXPERTS or max(experts) > _MAX_LAYER_EXPERTS:
        raise DamagedFile(path, f"has more than {_MAX_LAYER_EXPERTS} experts in a layer, or {_MAX_EXPERTS}", _REMEDY)
    if ids.min() < -1 or (ids.max(axis=(0, 2)) >= np.asarray(experts)).any():
        raise DamagedFile(path, "holds an expert that its layer does not have", _REMEDY)
    if ((ids < 0).any(axis=0) != (ids < 0).all(axis=0)).any():
        raise DamagedFile(path, "has a layer with more experts for some tokens than for others", _REMEDY)
    ranked = np.sort(ids, axis=2)
    if ((ranked[:, :, 1:] == ranked[:, :, :-1]) & (ranked[:, :, 1:] >= 0)).any() or (ranked[:, :, -1] < 0).any():
        raise DamagedFile(path, "holds an expert twice for one token and layer, or none", _REMEDY)
