"""Fixtures for every test; expensive ones are made once per session."""

from __future__ import annotations

import fcntl
import os
import shutil
import warnings
from collections import Counter
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests come first, so that none is left over for one process at the end of a run."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


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
    """tiny_checkpoint(model_type): the directory of a tiny random checkpoint. Do not write into it.

    Of the architectures without a configuration in `tiny.CONFIGS`, the one that `tests.export.architectures` makes.
    """

    @cache
    def make(model_type: str) -> Path:
        def save(folder: Path) -> Path:
            if model_type in tiny.CONFIGS:
                return tiny.save_checkpoint(folder, tiny.make_model(model_type))
            from tests.export.architectures import tiny_config

            return tiny.save_checkpoint(folder, tiny.randomize(tiny_config(model_type)))

        return once(shared / f"checkpoint-{model_type}", save)

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


@pytest.fixture(scope="session")
def reference_bundle(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """reference_bundle(scheme): the trained reference model's bundle, quantized unless `fp32`. Read only."""
    checkpoint = Path(__file__).parents[1] / "models" / "reference" / "checkpoint"

    def make(scheme: str, folder: Path) -> Bundle:
        from pocketmoe.export.convert import export_checkpoint
        from pocketmoe.quantize.apply import quantize_bundle

        return (
            export_checkpoint(checkpoint, folder)
            if scheme == "fp32"
            else quantize_bundle(made("fp32"), folder, scheme=scheme)
        )

    def made(scheme: str) -> Path:
        return once(shared / f"reference-{scheme}", lambda folder: make(scheme, folder))

    @cache
    def copied(scheme: str) -> Bundle:
        copy = tmp_path_factory.mktemp("reference") / scheme
        return Bundle.open(Path(shutil.copytree(made(scheme), copy)))

    return copied
