"""Codes that a checkpoint came with, kept: no weight is rounded again.

Groups become blocks of a size that divides them, each with its group's scale and zero point. What is computed is
(code - zero) * scale in float32; where the source's own library rounds that to the type of its scales, this does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pocketmoe.bundle.manifest import DenseTensor, Tensor
from pocketmoe.bundle.store import ExpertId
from pocketmoe.coded import CodedSource, CodeForm, Codes
from pocketmoe.errors import GateFailed
from pocketmoe.quantize.algorithms.formats import (
    BLOCKS,
    FLOAT_BLOCKS,
    BlockFormat,
    FloatFormat,
    Format,
    QuantizedMatrix,
    pack,
)
from pocketmoe.quantize.float_expert import FloatExpert

# Activations stay float32 where kernels allow: at 8 bits without rounding them they take 100 times as long.
ACCURACY_LEVELS = {2: 0, 4: 0, 8: 4}


def format_of(form: CodeForm, k: int) -> Format | None:
    """The format that holds such codes of rows of `k` weights, in the largest blocks; None where none does."""
    fitting = [block for block in BLOCKS if form.group >= k or form.group % block == 0]
    if form.kind == "int":
        return BlockFormat(form.bits, max(fitting), symmetric=not form.zeros).fitted(k) if fitting else None
    fitting = [block for block in fitting if block in FLOAT_BLOCKS and k % block == 0]
    return FloatFormat(form.kind, max(fitting)) if fitting else None


def matrix_of(codes: Codes, form: Format, *, by_rows: bool, name: str) -> QuantizedMatrix:
    """The matrix W [N, K] of codes that are stored [N, K], or [K, N] where not `by_rows`.

    Raises GateFailed, with `name`, where a block has more than one scale or zero point, which is a bug.
    """
    values, scales = _oriented(codes.codes, by_rows), _of_blocks(_oriented(codes.scales, by_rows), form.block, name)
    n, k = values.shape
    if isinstance(form, FloatFormat):
        return QuantizedMatrix(form, k, (values[:, ::2] * 16 + values[:, 1::2]).astype(np.uint8), scales)
    padded = np.pad(values, ((0, 0), (0, form.n_blocks(k) * form.block - k)))
    packed = pack(padded.reshape(n, -1, form.block), form.bits)
    if form.symmetric:
        return QuantizedMatrix(form, k, packed, scales)
    assert codes.zeros is not None
    zeros = _of_blocks(_oriented(codes.zeros, by_rows), form.block, name)
    return QuantizedMatrix(form, k, packed, scales, pack(zeros, form.bits))


def _oriented(stored: np.ndarray, by_rows: bool) -> np.ndarray:
    return np.ascontiguousarray(stored if by_rows else stored.T)


def _of_blocks(of_weights: np.ndarray, block: int, name: str) -> np.ndarray:
    """[N, blocks] of [N, K]."""
    of_blocks = np.ascontiguousarray(of_weights[:, ::block])
    if not np.array_equal(np.repeat(of_blocks, block, axis=1)[:, : of_weights.shape[1]], of_weights):
        raise GateFailed(f"{name}: a block of {block} weights has several scales", "This is a bug: report it.")
    return of_blocks


class Kept:
    """Which weights of a draft have codes that can be kept, in which formats, and these."""

    def __init__(self, coded: CodedSource) -> None:
        self._coded = coded
        self._dense = coded.dense
        self._unfit: list[str] = []

    def dense_form(self, tensor: DenseTensor, k: int, *, gathered: bool) -> Format | None:
        """The format of a dense tensor with rows of `k` weights; None where it stays as it is."""
        coded = self._dense.get(tensor.name)
        form = None if coded is None else self._format_of(coded, k, tensor.name)
        if gathered and (not isinstance(form, BlockFormat) or form.bits < 4 or k * form.bits % 8):
            return None
        return form

    def _format_of(self, coded: CodeForm, k: int, name: str) -> Format | None:
        form = format_of(coded, k)
        if form is None:
            self._unfit.append(name)
        return form

    def dense_matrix(self, name: str, form: Format, *, by_rows: bool) -> QuantizedMatrix:
        return matrix_of(self._coded.read_dense(name), form, by_rows=by_rows, name=name)

    def expert_forms(self, expert: ExpertId, tensors: Sequence[Tensor], kind: FloatExpert) -> tuple[Format | None, ...]:
        """A format for each of an expert's matrices; None for one that stays as it is."""
        forms: list[Format | None] = []
        for tensor in tensors:
            coded, use = self._coded.expert(expert, tensor.name), kind.uses.get(tensor.name)
            fits = coded is not None and use is not None and use.kind == "matmul"
            k = tensor.shape[1 if use is not None and use.by_rows else 0]
            name = f"layer {expert.layer}, expert {expert.expert}, {tensor.name}"
            forms.append(self._format_of(coded, k, name) if coded is not None and fits else None)
        return tuple(forms)

    def expert_matrices(
        self, expert: ExpertId, places: Mapping[str, tuple[Format, bool]]
    ) -> dict[str, QuantizedMatrix]:
        """The matrices of an expert by tensor; `places`: their formats, and whether they are stored [N, K]."""
        return {
            name: matrix_of(self._coded.read_expert(expert, name), form, by_rows=by_rows, name=name)
            for name, (form, by_rows) in places.items()
        }

    @property
    def notes(self) -> tuple[str, ...]:
        if not self._unfit:
            return self._coded.left
        more = f" and {len(self._unfit) - 1} more" if len(self._unfit) > 1 else ""
        return (*self._coded.left, f"dequantized, since no block holds their groups: {self._unfit[0]}{more}")
