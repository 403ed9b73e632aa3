"""Quantizes experts, one record at a time: what is in memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import onnx_ir as ir

from pocketmoe.bundle.manifest import ExpertKind, Tensor
from pocketmoe.bundle.reader import Bundle
from pocketmoe.calibration import ExpertSample, Hessian
from pocketmoe.errors import DamagedFile, UnsupportedModel
from pocketmoe.quantize.algorithms.choice import Algorithm
from pocketmoe.quantize.algorithms.formats import Format, QuantizedMatrix, dequantize, relative_error
from pocketmoe.quantize.checks import Probe, check_matrix
from pocketmoe.quantize.float_expert import FloatExpert
from pocketmoe.quantize.graphs.rewrite import ALIGNMENT, Level, Packed, externals, is_matrix, load, pack_parts, rewrite

LOCATION = "record"


@dataclass(frozen=True)
class KindFormat:
    """What a kind of expert becomes: the name of its graph, and a format for each matrix in the order of the record."""

    graph: str
    forms: tuple[Format | None, ...]  # None: it stays as it is
    accuracy_level: Level
    algorithm: Algorithm

    @property
    def label(self) -> str:
        """int4-b64-asym, or int4-b64-asym + int2-b32 where the matrices differ."""
        return " + ".join(dict.fromkeys("fp32" if form is None else form.label for form in self.forms))


@dataclass(frozen=True)
class ExpertReport:
    """How far one expert is from what it was: its worst matrix, and its output (both relative, Frobenius)."""

    name: str
    matrix_error: float
    output_error: float


def matrices_of(kind: ExpertKind) -> tuple[Tensor, ...]:
    """The tensors of an expert that are quantized, in the order of its record."""
    return tuple(tensor for tensor in kind.tensors if is_matrix(tensor.shape, tensor.dtype))


def inner_side(kind: FloatExpert, matrix: Tensor) -> int:
    """K of a matrix: how many inputs each of its outputs has."""
    return matrix.shape[1] if kind.uses[matrix.name].by_rows else matrix.shape[0]


class KindQuantizer:
    """Turns the records of one kind of expert into those of a quantized kind.

    Safe to use from several threads, and can be sent to other processes.
    """

    def __init__(self, bundle: Bundle, kind: ExpertKind, target: KindFormat) -> None:
        """Raises UnsupportedModel for an expert with a matrix that is not just multiplied by, DamagedFile."""
        path = bundle.check_file(kind.graph)
        model = load(path)
        tensors = externals(model)
        if {(name, t.offset) for name, t in tensors.items()} != {(t.name, t.offset) for t in kind.tensors}:
            raise DamagedFile(path, "its weights are not those that the manifest lists")
        self._source = kind
        self._algorithm = target.algorithm
        self._float = FloatExpert(path, kind)
        forms = {t.name: form for t, form in zip(matrices_of(kind), target.forms, strict=True) if form is not None}
        self._packed, self._kept, self._nbytes = _lay_out(self._float, forms, path.name)
        places = {name: t.offset for name, t in self._kept.items()}
        replaced = rewrite(model, self._packed, places, LOCATION, target.accuracy_level)
        assert replaced >= len(self._packed)
        self.graph = ir.to_proto(model).SerializeToString()
        self.kind = self._describe(target)
        self.planned_bytes = sum(4 * packed.n * packed.k for packed in self._packed.values())
        self._probe = Probe(path.read_bytes(), self.graph, self._float.width, list(forms.values()))

    @property
    def places(self) -> dict[str, tuple[Format, bool]]:
        """The tensors that are quantized: in which format, and whether they are stored [N, K]."""
        return {name: (packed.form, packed.use.by_rows) for name, packed in self._packed.items()}

    def convert(
        self,
        record: memoryview,
        name: str,
        sample: ExpertSample | None,
        kept: Mapping[str, QuantizedMatrix] | None = None,
    ) -> tuple[bytearray, ExpertReport]:
        """The quantized record of an expert, which errors call `name`. Raises BadInput, GateFailed.

        `sample`: the tokens that calibration brought to it; None without calibration. `kept`: what its matrices become,
        where that is known already.
        """
        result = bytearray(self._nbytes)
        worst = 0.0
        weights = self._float.weights(record)
        for tensor in self._source.tensors:
            packed = self._packed.get(tensor.name)
            if packed is None:
                start = self._kept[tensor.name].offset
                result[start : start + tensor.nbytes] = record[tensor.offset : tensor.offset + tensor.nbytes]
                continue
            by_rows = packed.use.by_rows
            weight = weights[tensor.name] if by_rows else weights[tensor.name].T
            what = f"{name}, {tensor.name}"
            hessian = None
            if sample is not None and self._algorithm.goes_by_inputs:
                hessian = hessian_of(self._float, weights, tensor.name, sample)
            if kept is None:
                matrix = self._algorithm(weight, packed.form, name=what, hessian=hessian)
            else:
                matrix = kept[tensor.name]
            error = relative_error(weight, matrix)
            if hessian is None:  # with one, large weights may err on small inputs: the expert's output is checked
                check_matrix(what, error, packed.form)
            worst = max(worst, error)
            put(result, packed, matrix)
            if sample is not None:  # later matrices are rounded for the inputs that this one now gives them
                rounded = dequantize(matrix)
                weights[tensor.name] = rounded if by_rows else np.ascontiguousarray(rounded.T)
        return result, ExpertReport(name, worst, self.check(record, memoryview(result), name, sample))

    def check(self, record: memoryview, quantized: memoryview, name: str, sample: ExpertSample | None) -> float:
        """How far a quantized record's output is from that of the record it was made of. Raises GateFailed."""
        return self._probe.check(name, record, quantized, None if sample is None else sample.x)

    def _describe(self, target: KindFormat) -> ExpertKind:
        tensors = list(self._kept.values())
        for packed in self._packed.values():
            tensors += [
                Tensor(name=p.name, dtype=p.dtype, shape=p.shape, offset=p.offset, nbytes=p.nbytes)
                for p in packed.parts
            ]
        tensors.sort(key=lambda tensor: tensor.offset)
        return msgspec.structs.replace(
            self._source, graph=target.graph, tensors=tuple(tensors), nbytes=self._nbytes, scheme=target.label
        )


def hessian_of(kind: FloatExpert, weights: Mapping[str, np.ndarray], matrix: str, sample: ExpertSample) -> Hessian:
    """Of a matrix's squared output error over the sample, each token as heavy as the router makes it: float32 [K, K].

    `weights`: the expert's tensors by name, in the shapes and dtypes of its kind; `matrix`: the name of one of them.
    """
    inputs = kind.inputs_of(matrix, weights, sample.x) * sample.weights[:, None]
    return Hessian(np.asarray(inputs.T @ inputs, np.float32), len(inputs))


def put(target: bytearray, packed: Packed, matrix: QuantizedMatrix) -> None:
    """Copy a quantized matrix's parts, arrays of the shapes in `packed`, to their places in `target`."""
    for part, array in zip(packed.parts, matrix.parts, strict=True):
        assert array.nbytes == part.nbytes
        target[part.offset : part.offset + part.nbytes] = np.ascontiguousarray(array).data.cast("B")


def record_bytes(kind: FloatExpert, forms: Sequence[Format]) -> int:
    """The length of an expert's record with these formats of its matrices."""
    named = {t.name: form for t, form in zip(matrices_of(kind.kind), forms, strict=True)}
    return _lay_out(kind, named, kind.kind.graph)[2]


def _lay_out(
    source: FloatExpert, forms: Mapping[str, Format], graph: str
) -> tuple[dict[str, Packed], dict[str, Tensor], int]:
    """The quantized and the kept tensors with their places, in the order of the source, and the record's length."""
    packed: dict[str, Packed] = {}
    kept: dict[str, Tensor] = {}
    offset = 0
    for tensor in source.kind.tensors:
        use = source.uses.get(tensor.name)
        if tensor.name not in forms:
            kept[tensor.name] = msgspec.structs.replace(tensor, offset=offset)
            offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
            continue
        if use is None or use.kind != "matmul":
            raise UnsupportedModel(
                f"{graph}: the experts' matrix {tensor.name!r} is not simply multiplied by, and cannot be quantized",
                "Use the unquantized bundle, and report the architecture.",
            )
        n, k = tensor.shape if use.by_rows else tensor.shape[::-1]
        packed[tensor.name] = pack_parts(tensor.name, forms[tensor.name], use, n, k, offset)
        offset = packed[tensor.name].parts[-1].end
    return packed, kept, offset
