"""What each quantization scheme does to each class of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pocketmoe.errors import BadInput
from pocketmoe.manifest import Role
from pocketmoe.quantize.schemes import BlockFormat


@dataclass(frozen=True)
class Scheme:
    """How experts, and the dense tensors of each role, are stored. Roles that are not named stay as they are.

    `accuracy_level`: what MatMulNBits does with activations: 0 keeps them in float32, 4 rounds them to int8 per block.
    """

    name: str
    experts: BlockFormat
    dense: Mapping[Role, BlockFormat]
    accuracy_level: int = 4

    def describe(self) -> str:
        """One line: int4: experts int4-b64-asym, attention int8-b64, ..."""
        parts = [f"experts {self.experts.label}", *(f"{role} {form.label}" for role, form in self.dense.items())]
        return f"{self.name}: {', '.join(parts)}, accuracy level {self.accuracy_level}"


def _roles(attention: BlockFormat, embedding: BlockFormat) -> dict[Role, BlockFormat]:
    """Routers and norms are never quantized: they are small, and routing must not change."""
    return {
        "attention": attention,
        "shared_expert": attention,
        "head": attention,
        "other": attention,
        "embedding": embedding,
    }


# Chosen by benchmarks/quantize_schemes.py and by the reference model's perplexity (docs/LOG.md, 2026-11-24).
_INT8 = BlockFormat(8, 64)
_INT4 = BlockFormat(4, 64, symmetric=False)
_SCHEMES = {
    "int8": Scheme("int8", _INT8, _roles(_INT8, _INT8)),
    "int4": Scheme("int4", _INT4, _roles(_INT4, _INT8)),
}


def find_scheme(name: str) -> Scheme:
    """The scheme of that name. Raises BadInput for one that is not implemented."""
    if name not in _SCHEMES:
        raise BadInput(
            f"quantization scheme {name!r} is not implemented", f"Choose one of: {', '.join(sorted(_SCHEMES))}."
        )
    return _SCHEMES[name]
