"""The codes of weights that were quantized already, in the shapes in which a bundle stores these weights.

What transformers does with a checkpoint's tensors on the way into a model (stack, join, transpose) it does with their
codes, scales and zero points as well, each spread to one number a weight; so nothing is known here of architectures.
Dense weights are found again in dense.bin by their values, whatever a graph's fusions called them, joined or turned.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pocketmoe.bundle.manifest import DENSE, DenseTensor
from pocketmoe.bundle.store import ExpertId
from pocketmoe.coded import CodedSource, CodeForm, Codes
from pocketmoe.export.checkpoint.weights import Weights

if TYPE_CHECKING:
    from pocketmoe.export.capture.adapters import MoeModule
    from pocketmoe.export.packed.grid import Form

_BITS = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}  # of the integers that hold codes of so many bits


def code_form(form: Form) -> CodeForm:
    """What a packed weight's codes become where they are kept."""
    if form.kind == "e2m1":
        return CodeForm("int", 8, form.group, zeros=False)
    if form.kind != "int":
        return CodeForm(form.kind, 4, form.group, zeros=False)
    bits = _BITS[form.bits]
    return CodeForm("int", bits, form.group, zeros=form.zeros or bits != form.bits)


@dataclass(frozen=True)
class _Place:
    """Where a dense tensor's weights come from: parameters one after the other, along its outputs."""

    parameters: tuple[str, ...]
    by_rows: bool  # it is stored [N, K]
    form: CodeForm


class Coded(CodedSource):
    """The codes of a checkpoint's packed weights, by expert and by dense tensor."""

    def __init__(self, weights: Weights, modules: Sequence[MoeModule], transposed: Sequence[Collection[str]]) -> None:
        """`transposed`: of each module, the tensors that its experts' records have the other way round."""
        self._weights, self._modules, self._transposed = weights, modules, transposed
        self._places: dict[str, _Place] = {}
        self._not_found: list[str] = []

    def find_dense(self, root: Path, tensors: Sequence[DenseTensor]) -> None:
        """Look for the packed weights in a draft's dense.bin, float32. Each is read once."""
        experts = {name for moe in self._modules for name in moe.parameters()}
        packed = self._weights.packed_parameters(experts)
        starts: dict[bytes, list[str]] = {}
        for name in packed:
            starts.setdefault(self._weights.load(name)[name][0].numpy().tobytes(), []).append(name)
        found: set[str] = set()
        for tensor in tensors:
            if len(tensor.shape) != 2 or tensor.dtype != "float32":
                continue
            data = np.memmap(root / DENSE, np.float32, "r", tensor.offset, tensor.shape)
            place = next((place for turned in (False, True) if (place := self._match(data, turned, starts))), None)
            if place is not None:
                self._places[tensor.name] = place
                found |= {*place.parameters}
        self._not_found = [name for name in packed if name not in found]

    def _match(self, data: np.ndarray, turned: bool, starts: Mapping[bytes, list[str]]) -> _Place | None:
        """The parameters that lie one after the other in `data`, [N, K] or, turned, [K, N]; None for anything else."""
        outputs, parts = data.T if turned else data, list[str]()
        row = 0
        while row < len(outputs):
            candidates = starts.get(np.ascontiguousarray(outputs[row]).tobytes(), ())
            name = next((name for name in candidates if self._is_at(name, outputs[row:])), None)
            if name is None:
                return None
            parts.append(name)
            row += self._weights.shape(name)[0]
        forms = {self._weights.form_of(name) for name in parts}
        form = forms.pop() if len(forms) == 1 else None
        return None if form is None else _Place(tuple(parts), not turned, code_form(form))

    def _is_at(self, name: str, outputs: np.ndarray) -> bool:
        values = self._weights.load(name)[name].numpy()
        return len(values) <= len(outputs) and np.array_equal(values, outputs[: len(values)])

    @property
    def dense(self) -> Mapping[str, CodeForm]:
        return {name: place.form for name, place in self._places.items()}

    def read_dense(self, name: str) -> Codes:
        place = self._places[name]
        planes = [self._weights.planes(parameter) for parameter in place.parameters]
        joined = {plane: torch.cat([each[plane] for each in planes]) for plane in planes[0]}
        return _codes(place.form, joined, turned=not place.by_rows)

    def expert(self, expert: ExpertId, tensor: str) -> CodeForm | None:
        moe = self._modules[expert.layer]
        if moe.form.shared.get(tensor) is not None:
            return None
        target, stacked = moe.parameter(tensor, expert.expert)
        form = self._weights.form_of(target, expert.expert if stacked else None, moe.n_experts)
        return None if form is None else code_form(form)

    def read_expert(self, expert: ExpertId, tensor: str) -> Codes:
        moe = self._modules[expert.layer]
        target, stacked = moe.parameter(tensor, expert.expert)
        form = self.expert(expert, tensor)
        assert form is not None
        planes = self._weights.planes(target, expert.expert if stacked else None, moe.n_experts)
        return _codes(form, planes, turned=tensor in self._transposed[expert.layer])

    @property
    def left(self) -> tuple[str, ...]:
        names = [*self._weights.moved, *self._not_found]
        if not names:
            return ()
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return (f"dequantized, since their codes cannot be kept as they lie: {names[0]}{more}",)


def _codes(form: CodeForm, planes: Mapping[str, torch.Tensor], turned: bool) -> Codes:
    arrays = {name: (plane.T if turned else plane).numpy() for name, plane in planes.items()}
    zeros = arrays.get("zeros")
    return Codes(
        arrays["codes"].astype(np.uint8),
        arrays["scales"],
        zeros.astype(np.uint8) if zeros is not None and form.zeros else None,
    )
