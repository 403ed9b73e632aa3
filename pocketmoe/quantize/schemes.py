"""What each quantization scheme does to each class of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pocketmoe.bundle.manifest import Role
from pocketmoe.bundle.store import ExpertId
from pocketmoe.errors import BadInput, UnknownName
from pocketmoe.quantize.algorithms.formats import BlockFormat, FloatFormat, Format


@dataclass(frozen=True)
class Scheme:
    """How experts, and the dense tensors of each role, are stored. Roles that are not named stay as they are.

    `experts`: of those that `by_expert` does not name, which has a format for each of an expert's matrices, in the
    order of its record. `accuracy_level`: what MatMulNBits does with activations: 0 keeps them in float32, 4 rounds
    them to int8 per block; a number for all, or one by bits. `algorithm`: a name of `algorithms.choice`.
    """

    name: str
    experts: Format
    dense: Mapping[Role, Format]
    accuracy_level: int | Mapping[int, int] = 4
    algorithm: str = "search"
    by_expert: Mapping[ExpertId, tuple[Format, ...]] = field(default_factory=dict[ExpertId, tuple[Format, ...]])

    def forms_of(self, expert: ExpertId, n_matrices: int) -> tuple[Format, ...]:
        """A format for each of an expert's matrices."""
        return self.by_expert.get(expert, (self.experts,) * n_matrices)

    def describe(self) -> str:
        """One line: int4: experts int4-b64-asym, attention int8-b64, ..."""
        experts = self.experts.label
        if self.by_expert:
            labels = [(*e, *(form.label for form in forms)) for e, forms in sorted(self.by_expert.items())]
            experts = f"by plan {hashlib.sha256(repr(labels).encode()).hexdigest()[:12]}"
        parts = [f"experts {experts}", *(f"{role} {form.label}" for role, form in self.dense.items())]
        return f"{self.name}: {', '.join(parts)}, accuracy level {self.accuracy_level}, rounded by {self.algorithm}"


# Chosen by benchmarks/quantize_schemes.py and on the reference model (docs/LOG.md, 2026-11-24): what every token uses
# is int8 in either scheme, since attention in 4 bits costs more than all experts in 4 bits, and saves far less.
# Routers and norms are never quantized: they are small, and routing must not change.
_INT8 = BlockFormat(8, 64)
_INT4 = BlockFormat(4, 64, symmetric=False)
_DENSE: Mapping[Role, Format] = {
    "attention": _INT8,
    "shared_expert": _INT8,
    "head": _INT8,
    "embedding": _INT8,
    "other": _INT8,
}
# As small as llama.cpp's Q4_0, for who counts bytes: several times the KL of int4. Blocks of 128, since with its own
# scale and sum a block takes 64 bits more once packed: a tenth of what a token moves in blocks of 64, and of its time.
# An embedding is read by rows only, which costs no bandwidth, and stays int8.
_INT4_128 = BlockFormat(4, 128, symmetric=False)
_ALL: Mapping[Role, Format] = {role: form if role == "embedding" else _INT4_128 for role, form in _DENSE.items()}
_SCHEMES = {
    "int8": Scheme("int8", _INT8, _DENSE),
    "int4": Scheme("int4", _INT4, _DENSE),
    "int4-all": Scheme("int4-all", _INT4_128, _ALL),
    "int2": Scheme("int2", BlockFormat(2, 32, symmetric=False), _DENSE),
    "nf4": Scheme("nf4", FloatFormat("nf4", 64), _DENSE),
    "fp4": Scheme("fp4", FloatFormat("fp4", 64), _DENSE),
}
SCHEMES = tuple(_SCHEMES)
KEEP = "keep"  # leaves weights as they are
FLOAT32 = "float32"  # weights in full, whatever they were stored as
_EXPERTS = "experts"
CLASSES = (_EXPERTS, *_DENSE)


def find_scheme(name: str) -> Scheme:
    """The scheme of that name. Raises UnknownName for one that there is not."""
    if name in ("mixed", "keep"):
        raise BadInput(
            f"{name!r} is no scheme of fixed formats", f"`pocketmoe quantize BUNDLE -o SMALL --scheme {name}` makes it."
        )
    if name not in _SCHEMES:
        raise UnknownName("quantization scheme", name, sorted(_SCHEMES))
    return _SCHEMES[name]


def override(scheme: Scheme, formats: Mapping[str, Format]) -> Scheme:
    """The scheme with other formats for some classes of tensors, by name. Raises UnknownName for one there is not."""
    unknown = set(formats) - set(CLASSES)
    if unknown:
        raise UnknownName("class of tensors", min(unknown), CLASSES)
    dense = {role: formats.get(role, form) for role, form in scheme.dense.items()}
    added = ", ".join(f"{name}={form.label}" for name, form in formats.items())
    name = f"{scheme.name} ({added})" if formats else scheme.name
    return replace(scheme, name=name, experts=formats.get(_EXPERTS, scheme.experts), dense=dense)
