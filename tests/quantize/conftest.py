"""Quantized bundles, made once per session."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from pocketmoe.bundle.reader import Bundle
from pocketmoe.quantize.apply import quantize_bundle
from tests.conftest import once


@pytest.fixture(scope="session")
def quantized(
    tiny_bundle: Callable[[str], Bundle], shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Bundle]:
    """quantized(model_type, scheme): the tiny bundle of that type, quantized. Do not write into it."""

    @cache
    def make(model_type: str, scheme: str) -> Bundle:
        made = once(
            shared / f"{model_type}-{scheme}",
            lambda folder: quantize_bundle(tiny_bundle(model_type).root, folder, scheme=scheme),
        )
        copy = tmp_path_factory.mktemp("quantized") / made.name
        return Bundle.open(Path(shutil.copytree(made, copy)))

    return make
