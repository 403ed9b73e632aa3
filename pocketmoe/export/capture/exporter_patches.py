"""Additions to transformers' own table of patches, for what its exporter cannot express in ONNX otherwise."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch


@cache
def install() -> None:
    """Add the patches to the exporter's table; they apply while it exports. A second call does nothing."""
    from transformers.exporters.utils import register_patch

    register_patch("onnx", "torch.Tensor.__getitem__")(_complex_indexing)


def _complex_indexing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Index a complex tensor part by part: ONNX has none, and transformers translates them as pairs of real ones."""

    def patch(tensor: torch.Tensor, index: Any) -> torch.Tensor:
        if tensor.is_complex():
            return torch.complex(original(tensor.real, index), original(tensor.imag, index))
        return original(tensor, index)

    return patch
