"""Quantizes experts, one record at a time: what is in memory does not grow with their number."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
import onnx_ir as ir

from pocketmoe.bundle import Bundle
from pocketmoe.errors import DamagedFile, UnsupportedModel
from pocketmoe.manifest import ExpertKind, Tensor
from pocketmoe.quantize.gates import Probe, check_matrix
from pocketmoe.quantize.rewrite import ALIGNMENT, Packed, externals, find_uses, is_matrix, load, pack_parts, rewrite
from pocketmoe.quantize.schemes import BlockFormat, QuantizedMatrix, quantize, relative_error

LOCATION = "record"


@dataclass(frozen=True)
class ExpertReport:
    """How far one expert is from what it was: its worst matrix, and its output (both relative, Frobenius)."""

    name: str
    matrix_error: float
    output_error: float


class KindQuantizer:
    """Turns the records of one kind of expert into those of the quantized kind. Safe to use from several threads."""

    def __init__(self, bundle: Bundle, kind: ExpertKind, form: BlockFormat, level: int) -> None:
        """Raises UnsupportedModel for an expert with a matrix that is not just multiplied by, DamagedFile."""
        path = bundle.check_file(kind.graph)
        model = load(path)
        tensors = externals(model)
        if {(name, t.offset) for name, t in tensors.items()} != {(t.name, t.offset) for t in kind.tensors}:
            raise DamagedFile(path, "its weights are not those that the manifest lists")
        self._source = kind
        self._packed, self._kept, self._nbytes = _lay_out(kind, model, form, path.name)
        replaced = rewrite(model, self._packed, {name: t.offset for name, t in self._kept.items()}, LOCATION, level)
        assert replaced >= len(self._packed)
        self.graph = ir.to_proto(model).SerializeToString()
        self.kind = self._describe(form)
        self.planned_bytes = sum(4 * packed.n * packed.k for packed in self._packed.values())
        shape = model.graph.inputs[0].shape  # an expert may be narrower than the model
        width = None if shape is None else shape[1]
        if not isinstance(width, int):
            raise DamagedFile(path, "does not say how wide its input is")
        self._probe = Probe(path.read_bytes(), self.graph, width, form.bits)

    def convert(self, record: memoryview, name: str) -> tuple[bytearray, ExpertReport]:
        """The quantized record of an expert, which errors call `name`. Raises BadInput, GateFailed."""
        result = bytearray(self._nbytes)
        worst = 0.0
        for tensor in self._source.tensors:
            data = record[tensor.offset : tensor.offset + tensor.nbytes]
            packed = self._packed.get(tensor.name)
            if packed is None:
                start = self._kept[tensor.name].offset
                result[start : start + tensor.nbytes] = data
                continue
            stored = np.frombuffer(data, np.float32).reshape(tensor.shape)
            weight = stored if packed.use.by_rows else stored.T
            what = f"{name}, {tensor.name}"
            matrix = quantize(weight, packed.form, name=what)
            error = relative_error(weight, matrix)
            check_matrix(what, error, packed.form)
            worst = max(worst, error)
            put(result, packed, matrix)
        output_error = self._probe.check(name, record, memoryview(result))
        return result, ExpertReport(name, worst, output_error)

    def _describe(self, form: BlockFormat) -> ExpertKind:
        tensors = list(self._kept.values())
        for packed in self._packed.values():
            tensors += [
                Tensor(name=p.name, dtype=p.dtype, shape=p.shape, offset=p.offset, nbytes=p.nbytes)
                for p in packed.parts
            ]
        tensors.sort(key=lambda tensor: tensor.offset)
        return msgspec.structs.replace(self._source, tensors=tuple(tensors), nbytes=self._nbytes, scheme=form.label)


def put(target: bytearray, packed: Packed, matrix: QuantizedMatrix) -> None:
    """Copy a quantized matrix's parts to their places in `target`."""
    for part, array in zip(packed.parts, matrix.parts, strict=True):
        assert array.nbytes == part.nbytes
        target[part.offset : part.offset + part.nbytes] = np.ascontiguousarray(array).data.cast("B")


def _lay_out(
    kind: ExpertKind, model: ir.Model, form: BlockFormat, graph: str
) -> tuple[dict[str, Packed], dict[str, Tensor], int]:
    """The quantized and the kept tensors with their places, in the order of the source, and the record's length."""
    uses = find_uses(model)
    packed: dict[str, Packed] = {}
    kept: dict[str, Tensor] = {}
    offset = 0
    for tensor in kind.tensors:
        use = uses.get(tensor.name)
        if not is_matrix(tensor.shape, tensor.dtype):
            kept[tensor.name] = msgspec.structs.replace(tensor, offset=offset)
            offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
            continue
        if use is None or use.kind != "matmul":
            raise UnsupportedModel(
                f"{graph}: the experts' matrix {tensor.name!r} is not simply multiplied by, and cannot be quantized",
                "Use the unquantized bundle, and report the architecture.",
            )
        n, k = tensor.shape if use.by_rows else tensor.shape[::-1]
        packed[tensor.name] = pack_parts(tensor.name, form, use, n, k, offset)
        offset = packed[tensor.name].parts[-1].end
    return packed, kept, offset
