"""Checks that every quantized bundle passes: nothing was skipped, and no expert came out broken.

They catch what perplexity does not show: experts that a quantizer silently left alone or turned to zeros or NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pocketmoe.errors import DamagedFile, GateFailed
from pocketmoe.ort import Session, session_options
from pocketmoe.quantize.algorithms.formats import Format
from pocketmoe.quantize.graphs.rewrite import load

# Gaussian weights come to 0.10 (4 bits) and 0.007 (8 bits) at block 128, heavy tails to 0.16 and 0.012 (docs/LOG.md);
# beyond these limits a matrix is not what the format was made for, or the quantizer is broken.
MATRIX_LIMITS = {2: 0.8, 4: 0.25, 8: 0.025}
# The output of an expert made of such matrices, at accuracy level 4: 0.21 and 0.03 for heavy tails.
OUTPUT_LIMITS = {2: 1.5, 4: 0.6, 8: 0.15}

_QUANTIZED = ("MatMulNBits", "MatMulBnb4", "GatherBlockQuantized")
_ROWS = 4
_REAL_ROWS = 16
_REMEDY = "Quantize with more bits (--scheme int8), or check the checkpoint."


def check_matrix(name: str, error: float, form: Format) -> None:
    """A matrix's relative error (Frobenius) is within its limit. Raises GateFailed."""
    limit = MATRIX_LIMITS[form.bits]
    if not error <= limit:
        raise GateFailed(f"{name}: {form.label} changes it by {error:.3f} of its norm, the limit is {limit}", _REMEDY)


class Probe:
    """Runs each expert of a kind before and after, on the same rows, by ONNX Runtime's own kernels."""

    def __init__(self, before: bytes, after: bytes, hidden: int, forms: Sequence[Format]) -> None:
        """`forms`: of the expert's matrices; the coarsest decides how far its output may be off."""
        self._models = (before, after)
        self._limit = max((OUTPUT_LIMITS[form.bits] for form in forms), default=0.0)
        self._x = np.random.default_rng(0).standard_normal((_ROWS, hidden)).astype(np.float32)

    def check(
        self, name: str, before: memoryview, after: memoryview, rows: npt.NDArray[np.float32] | None = None
    ) -> float:
        """The relative error of the expert's output, given its records. Raises GateFailed. Safe in several threads.

        `rows`: what calibration brought to it, float32 [rows, width]; random ones without.
        """
        x = self._x if rows is None else np.ascontiguousarray(rows[:: max(1, len(rows) // _REAL_ROWS)])
        truth, found = (_run(name, m, r, x) for m, r in zip(self._models, (before, after), strict=True))
        if not np.isfinite(truth).all():
            raise GateFailed(f"{name}: its output is not finite even before quantizing", "Check the checkpoint.")
        norm, off = float(np.linalg.norm(truth)), float(np.linalg.norm(found - truth))
        if not np.isfinite(found).all() or (norm > 0) != bool(found.any()):
            raise GateFailed(f"{name}: quantized, its output is {'zero' if not found.any() else 'not finite'}", _REMEDY)
        if np.ptp(truth, axis=0).any() and not np.ptp(found, axis=0).any():
            raise GateFailed(f"{name}: quantized, its output is the same whatever goes in", _REMEDY)
        error = off / norm if norm else 0.0
        if not error <= self._limit:
            raise GateFailed(
                f"{name}: quantized, its output is off by {error:.3f}, the limit is {self._limit}", _REMEDY
            )
        return error


def check_share(graphs: Iterable[Path], planned: int) -> None:
    """The graphs, as they were written, hold quantized weights that took `planned` bytes in float32.

    A weight that several graphs read counts once. Raises GateFailed.
    """
    found: dict[int, int] = {}
    for path in graphs:
        for node in load(path).graph:
            if node.op_type in _QUANTIZED:
                offset, count = _quantized_weights(path, node)
                found[offset] = 4 * count
    if sum(found.values()) != planned:
        raise GateFailed(
            f"weights of {sum(found.values())} bytes were quantized, {planned} were planned",
            "This is a bug: report it.",
        )


def _quantized_weights(path: Path, node: ir.Node) -> tuple[int, int]:
    """Where a node's codes lie in their file, and how many weights they stand for.

    Raises DamagedFile for a node that has none: the bundle's own graphs may hold such operators from the start.
    """
    gathers = node.op_type == "GatherBlockQuantized"
    codes = dict(enumerate(node.inputs)).get(0 if gathers else 1)
    tensor = codes.const_value if codes is not None else None
    sizes = [node.attributes.get(name) for name in (("bits",) if gathers else ("K", "N"))]
    numbers = [size.as_int() for size in sizes if size is not None and size.type == ir.AttributeType.INT]
    if not isinstance(tensor, ir.ExternalTensor) or len(numbers) < len(sizes) or (gathers and numbers[0] < 1):
        raise DamagedFile(path, f"has a {node.op_type} without quantized weights")
    count = (tensor.length or 0) * 8 // numbers[0] if gathers else numbers[0] * numbers[1]
    return tensor.offset or 0, count


def _run(name: str, model: bytes, record: memoryview, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    options = session_options(threads=1)
    options.add_external_initializers_from_files_in_memory(["record"], [record], [record.nbytes])
    session = Session(model, options, name)
    return session.run(None, {session.inputs[0].name: x})[0]
