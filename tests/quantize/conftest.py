"""Bundles to quantize, exported once per session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from pocketmoe.bundle import Bundle
from pocketmoe.export.convert import export_checkpoint
from pocketmoe.quantize.apply import quantize_bundle


@pytest.fixture(scope="session")
def exported(
    tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Bundle]:
    """exported(model_type): the float32 bundle of a tiny checkpoint. Do not write into it."""

    @cache
    def make(model_type: str) -> Bundle:
        return export_checkpoint(tiny_checkpoint(model_type), tmp_path_factory.mktemp("exported") / model_type)

    return make


@pytest.fixture(scope="session")
def quantized(
    exported: Callable[[str], Bundle], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Bundle]:
    """quantized(model_type, scheme): that bundle, quantized. Do not write into it."""

    @cache
    def make(model_type: str, scheme: str) -> Bundle:
        target = tmp_path_factory.mktemp("quantized") / f"{model_type}-{scheme}"
        return quantize_bundle(exported(model_type).root, target, scheme=scheme)

    return make
