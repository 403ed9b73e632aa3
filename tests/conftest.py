"""Fixtures for every test; expensive ones are made once per session."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import Phase, settings

from pocketmoe.bundle.reader import Bundle
from tests import tiny

# For mutants, of which it only matters whether they are found, and found again: `make mutate` asks for it.
settings.register_profile(
    "mutate", derandomize=True, phases=[Phase.explicit, Phase.generate], report_multiple_bugs=False
)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny_checkpoint(model_type): the directory of a tiny random checkpoint. Do not write into it."""

    @cache
    def make(model_type: str) -> Path:
        directory = tmp_path_factory.mktemp(f"checkpoint-{model_type}")
        return tiny.save_checkpoint(directory, tiny.make_model(model_type))

    return make


@pytest.fixture(scope="session")
def tiny_bundle(
    tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Bundle]:
    """tiny_bundle(model_type): the unquantized bundle of that checkpoint (10 to 30 s the first time). Read only."""

    @cache
    def export(model_type: str) -> Bundle:
        from pocketmoe.export.convert import export_checkpoint

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what transformers says about the tiny configurations
            source = tiny_checkpoint(model_type)
            return export_checkpoint(source, tmp_path_factory.mktemp("bundles") / model_type)

    return export
