"""Quantizes what every token uses: attention, shared experts, embedding and head, in dense.bin by role."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pocketmoe.bundle.manifest import DENSE, DenseTensor, Manifest, Role
from pocketmoe.bundle.reader import Bundle
from pocketmoe.calibration import Calibration, Hessian
from pocketmoe.errors import DamagedFile, GateFailed
from pocketmoe.quantize.algorithms.choice import find_algorithm
from pocketmoe.quantize.algorithms.formats import BlockFormat, Format, relative_error
from pocketmoe.quantize.checks import check_matrix
from pocketmoe.quantize.graphs.rewrite import (
    ALIGNMENT,
    Packed,
    Use,
    externals,
    find_uses,
    is_matrix,
    load,
    pack_parts,
    rewrite,
)
from pocketmoe.quantize.kept import Kept
from pocketmoe.quantize.schemes import Scheme

LOCATION = PurePosixPath(DENSE).name
MUST: tuple[Role, ...] = ("embedding", "head", "attention", "shared_expert")  # what a scheme may not leave out
MAX_SHARE_LEFT = 0.05  # of those roles' matrices, in bytes, when their graphs use them in ways that cannot be rewritten


@dataclass
class Entry:
    """One tensor of the source's dense.bin and what becomes of it: quantized for each use, or a copy at `offset`.

    A tied embedding and head are two uses of one tensor. In the same format they share their bytes.
    """

    source: DenseTensor
    offset: int = 0
    packed: dict[Use, Packed] = field(default_factory=dict[Use, Packed])
    uses: set[Use | None] = field(default_factory=set[Use | None])

    @property
    def stored(self) -> list[Packed]:
        """The quantized forms that have bytes of their own, in file order."""
        return list({packed.parts[0].offset: packed for packed in self.packed.values()}.values())

    @property
    def multiplied(self) -> bool:
        """No use gathers its rows: then what matters is the error of products with its inputs."""
        return all(use.kind == "matmul" for use in self.packed)

    @property
    def end(self) -> int:
        if self.packed:
            return self.stored[-1].parts[-1].end
        return self.offset + -(-self.source.nbytes // ALIGNMENT) * ALIGNMENT

    def describe(self) -> list[DenseTensor]:
        """The new manifest's entries for it."""
        if not self.packed:
            return [msgspec.structs.replace(self.source, offset=self.offset)]
        role = self.source.role
        return [
            DenseTensor(
                name=part.name,
                role=role,
                dtype=part.dtype,
                shape=part.shape,
                offset=part.offset,
                nbytes=part.nbytes,
                scheme=packed.form.label,
            )
            for packed in self.stored
            for part in packed.parts
        ]


class DensePlan:
    """The graphs that read dense.bin, and the new place of each tensor."""

    def __init__(
        self, bundle: Bundle, scheme: Scheme, calibration: Calibration | None = None, kept: Kept | None = None
    ) -> None:
        """`kept`: decides, and gives the codes, in the scheme's place.

        Raises DamagedFile, and GateFailed when too much of what the scheme names could not be quantized.
        """
        manifest = bundle.manifest
        self._scheme = scheme
        self._kept = kept
        self._algorithm = find_algorithm(scheme.algorithm)
        self._hessians: Mapping[str, Hessian] = calibration.dense if calibration else {}
        self._graphs = {name: load(bundle.path(name)) for name in graph_names(manifest)}
        self.entries = {tensor.offset: Entry(tensor) for tensor in manifest.dense if tensor.nbytes}
        for name, model in self._graphs.items():
            self._note_uses(bundle.path(name), model)
        offset = 0
        for entry in sorted(self.entries.values(), key=lambda entry: entry.source.offset):
            self._place(entry, offset)
            offset = entry.end
        self.nbytes = offset
        self.notes = self._check_left_out()

    @property
    def planned_bytes(self) -> int:
        """The float32 bytes of what will be quantized."""
        return sum(4 * packed.n * packed.k for entry in self.entries.values() for packed in entry.stored)

    def tensors(self) -> tuple[DenseTensor, ...]:
        """The new manifest's dense tensors, in file order."""
        return tuple(t for e in sorted(self.entries.values(), key=lambda e: e.end) for t in e.describe())

    def write_graphs(self, root: Path) -> None:
        """Rewrite the graphs into the new bundle's directory."""
        for name, model in self._graphs.items():
            packed: dict[str, Packed] = {}
            kept: dict[str, int] = {}
            uses = find_uses(model)
            for weight, tensor in externals(model).items():
                entry = self.entries[tensor.offset or 0]
                if entry.packed:
                    packed[weight] = entry.packed[uses[weight]]
                else:
                    kept[weight] = entry.offset
            rewrite(model, packed, kept, LOCATION, self._scheme.accuracy_level)
            (root / name).write_bytes(ir.to_proto(model).SerializeToString())

    def jobs(self, source: Path) -> Iterator[Callable[[], list[tuple[int, memoryview]]]]:
        """For each tensor, in file order, what computes its new bytes: pairs of offset and bytes."""
        data = np.memmap(source, np.uint8, "r")
        for entry in sorted(self.entries.values(), key=lambda entry: entry.end):
            start = entry.source.offset
            part = data[start : start + entry.source.nbytes]
            yield lambda entry=entry, part=part: self._convert(entry, part)

    def _convert(self, entry: Entry, data: npt.NDArray[np.uint8]) -> list[tuple[int, memoryview]]:
        """The new bytes of a tensor, given its old ones: pairs of offset and bytes."""
        if not entry.packed:
            return [(entry.offset, data.data)]
        stored = data.view(np.float32).reshape(entry.source.shape)
        return [chunk for packed in entry.stored for chunk in self._pack(entry, packed, stored)]

    def _pack(self, entry: Entry, packed: Packed, stored: npt.NDArray[np.float32]) -> list[tuple[int, memoryview]]:
        name = entry.source.name
        weight = stored if packed.use.by_rows else stored.swapaxes(-1, -2).reshape(-1, packed.k)
        hessian = self._hessians.get(name) if entry.multiplied else None
        if self._kept is None:
            matrix = self._algorithm(weight, packed.form, name=name, hessian=hessian)
        else:
            matrix = self._kept.dense_matrix(name, packed.form, by_rows=packed.use.by_rows)
        check_matrix(name, relative_error(weight, matrix), packed.form)
        arrays = list(matrix.parts)
        if packed.use.kind == "gather":  # rows are not padded to whole blocks
            arrays[0] = matrix.codes.reshape(packed.n, -1)[:, : packed.parts[0].shape[1]]
        return [
            (part.offset, np.ascontiguousarray(array).data.cast("B"))
            for part, array in zip(packed.parts, arrays, strict=True)
        ]

    def _note_uses(self, path: Path, model: ir.Model) -> None:
        uses = find_uses(model)
        for weight, tensor in externals(model).items():
            entry = self.entries.get(tensor.offset or 0)
            if tensor.location != LOCATION or entry is None or entry.source.nbytes != tensor.length:
                raise DamagedFile(path, f"its weight {weight!r} is not one that the manifest lists")
            entry.uses.add(uses.get(weight))

    def _place(self, entry: Entry, offset: int) -> None:
        entry.offset = offset
        uses = sorted((use for use in entry.uses if use is not None), key=lambda use: (use.kind, use.by_rows))
        forms = [self._form(entry.source, use) for use in uses]
        if None in entry.uses or None in forms:
            return
        shared = len({form for form in forms if form is not None}) == 1 and _may_share(entry, uses, forms[0])
        for use, form in zip(uses, forms, strict=True):
            assert form is not None
            kind = f"{use.kind}_rows" if use.by_rows else use.kind
            name = entry.source.name if len(uses) == 1 or shared else f"{entry.source.name}.{kind}"
            n, k = entry.source.shape[-2:] if use.by_rows else entry.source.shape[:-3:-1]
            n *= use.heads or 1
            entry.packed[use] = packed = pack_parts(name, form, use, n, k, offset)
            offset = offset if shared else packed.parts[-1].end

    def _form(self, tensor: DenseTensor, use: Use) -> Format | None:
        """The format that the scheme has for a tensor; rows are gathered from an embedding only."""
        if self._kept is not None:
            k = tensor.shape[1 if use.by_rows else 0] if is_matrix(tensor.shape, tensor.dtype) else 0
            return self._kept.dense_form(tensor, k, gathered=use.kind == "gather") if k else None
        tied = tensor.role == "embedding" and use.kind == "matmul"
        form = self._scheme.dense.get("head" if tied else tensor.role)
        if form is None or not is_matrix(tensor.shape, tensor.dtype) or (len(tensor.shape) == 3) != bool(use.heads):
            return None
        if use.kind == "gather":
            whole_bytes = tensor.shape[1] * form.bits % 8 == 0
            if tensor.role != "embedding" or not isinstance(form, BlockFormat) or form.bits < 4 or not whole_bytes:
                return None
        return form

    def _check_left_out(self) -> tuple[str, ...]:
        """A note for each large matrix that was to be quantized and could not. Raises GateFailed when they are many."""
        wanted = [
            e
            for e in self.entries.values()
            if e.source.role in MUST
            and e.source.role in self._scheme.dense
            and is_matrix(e.source.shape, e.source.dtype)
            and (len(e.source.shape) == 2 or any(use is not None and use.heads for use in e.uses))
        ]
        left = [e for e in wanted if not e.packed]
        left_bytes, wanted_bytes = (sum(e.source.nbytes for e in entries) for entries in (left, wanted))
        if left_bytes > MAX_SHARE_LEFT * wanted_bytes:
            share, names = left_bytes / wanted_bytes, ", ".join(e.source.name for e in left[:3])
            raise GateFailed(
                f"{share:.0%} of the dense weights cannot be quantized, by how they are used: {names}",
                "Use the unquantized bundle, and report the architecture.",
            )
        tied = [e for e in self.entries.values() if len(e.stored) > 1]
        return (
            *(f"not quantized: {e.source.name} ({e.source.nbytes} bytes)" for e in left),
            *(f"{e.source.name} is embedding and head: stored twice, in {_labels(e)}" for e in tied),
        )


def graph_names(manifest: Manifest) -> list[str]:
    """The graphs that read dense.bin."""
    routers = [layer.router for layer in manifest.moe_layers if layer.router is not None]
    return list(dict.fromkeys([*(segment.graph for segment in manifest.segments), *routers]))


def _may_share(entry: Entry, uses: list[Use], form: Format | None) -> bool:
    """Both uses read the same rows, and whole blocks of them: then their codes are the same bytes."""
    if form is None or not all(use.by_rows for use in uses):
        return False
    k = entry.source.shape[1]
    return k % form.fitted(k).block == 0


def _labels(entry: Entry) -> str:
    return " and ".join(packed.form.label for packed in entry.stored)
