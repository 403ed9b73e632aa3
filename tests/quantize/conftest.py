"""Quantized bundles, made once per session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from pocketmoe.bundle.reader import Bundle
from pocketmoe.quantize.apply import quantize_bundle


@pytest.fixture(scope="session")
def quantized(
    tiny_bundle: Callable[[str], Bundle], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Bundle]:
    """quantized(model_type, scheme): the tiny bundle of that type, quantized. Do not write into it."""

    @cache
    def make(model_type: str, scheme: str) -> Bundle:
        target = tmp_path_factory.mktemp("quantized") / f"{model_type}-{scheme}"
        return quantize_bundle(tiny_bundle(model_type).root, target, scheme=scheme)

    return make
