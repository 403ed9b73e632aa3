"""Fixtures for every test; expensive ones are made once per session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny_checkpoint(model_type): the directory of a tiny random checkpoint. Do not write into it."""

    @cache
    def make(model_type: str) -> Path:
        directory = tmp_path_factory.mktemp(f"checkpoint-{model_type}")
        return tiny.save_checkpoint(directory, tiny.make_model(model_type))

    return make
