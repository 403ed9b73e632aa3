"""The tiny OLMoE as transformers runs it, and as a bundle behind transformers' own `generate`."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pocketmoe.bundle.reader import Bundle
from tests.hub.conftest import hub

__all__ = ["hub"]


@pytest.fixture(scope="package")
def root(tiny_bundle: Callable[[str], Bundle], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundle that may be packed."""
    copy = tmp_path_factory.mktemp("optimum") / "TINY"
    shutil.copytree(tiny_bundle("olmoe").root, copy, ignore=shutil.ignore_patterns("packed"))
    return copy


@pytest.fixture(scope="package")
def reference(tiny_checkpoint: Callable[[str], Path]) -> Any:
    """transformers' own model of the checkpoint."""
    return reference_of(tiny_checkpoint("olmoe"))


def reference_of(checkpoint: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="package")
def model(root: Path) -> Iterator[Any]:
    """The bundle, with room for three rows."""
    from pocketmoe.integrations.optimum import PocketMoEForCausalLM

    with PocketMoEForCausalLM.from_pretrained(root, sequences=3) as loaded:
        yield loaded


@pytest.fixture(scope="package")
def tokenizer(root: Path) -> Any:
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(root, subfolder="tokenizer")
    found.pad_token, found.padding_side = "</s>", "left"
    return found
