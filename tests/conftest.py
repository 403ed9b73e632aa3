"""Fixtures for every test; expensive ones are made once per session."""

from __future__ import annotations

import fcntl
import os
import shutil
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
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run's, in which its processes find what another has made already (`once`)."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def once(target: Path, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills, in the first process that wants it; others wait for that one, and only read it."""
    with open(target.with_name(f"{target.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            making = target.with_name(f"{target.name}.making")
            make(making)
            making.rename(target)
    return target


@pytest.fixture(scope="session")
def tiny_checkpoint(shared: Path) -> Callable[[str], Path]:
    """tiny_checkpoint(model_type): the directory of a tiny random checkpoint. Do not write into it."""

    @cache
    def make(model_type: str) -> Path:
        return once(
            shared / f"checkpoint-{model_type}",
            lambda folder: tiny.save_checkpoint(folder, tiny.make_model(model_type)),
        )

    return make


@pytest.fixture(scope="session")
def tiny_bundle(
    tiny_checkpoint: Callable[[str], Path], shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Bundle]:
    """tiny_bundle(model_type): the unquantized bundle of that checkpoint (10 to 30 s the first time). Read only.

    Each process has a copy, into which it packs and counts.
    """

    @cache
    def export(model_type: str) -> Bundle:
        from pocketmoe.export.convert import export_checkpoint

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what transformers says about the tiny configurations
            source = tiny_checkpoint(model_type)
            made = once(shared / f"bundle-{model_type}", lambda folder: export_checkpoint(source, folder))
        copy = tmp_path_factory.mktemp("bundles") / model_type
        return Bundle.open(Path(shutil.copytree(made, copy)))

    return export
