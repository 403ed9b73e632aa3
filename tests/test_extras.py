"""Without the extras: what the package itself asks for is enough for a device, and the rest says what to install."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from tests import runnable
from tests.hang import HANG_S

REPOSITORY = Path(__file__).parents[1]


def required(name: str) -> Iterator[str]:
    """The distributions that one needs, without extras, but for itself."""
    for line in metadata.requires(name) or []:
        requirement, _, marker = line.partition(";")
        if "extra" not in marker:
            yield re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0]


def closure(name: str) -> set[str]:
    """All distributions that come with one, where they are installed here."""
    found: set[str] = set()
    waiting = [*required(name)]
    while waiting:
        other = waiting.pop().lower().replace("_", "-")
        if other not in found:
            found.add(other)
            try:
                waiting += required(other)
            except metadata.PackageNotFoundError:  # of another platform
                found.discard(other)
    return found


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of what an installation without extras brings, by links to what is installed here."""
    folder = tmp_path_factory.mktemp("bare")
    for name in closure("pocketmoe"):
        distribution = metadata.distribution(name)
        for top in {path.parts[0] for path in distribution.files or []} - {"..", "__pycache__"}:
            (folder / top).symlink_to(Path(str(distribution.locate_file(top))))
    assert not {"torch", "transformers", "onnx", "starlette", "llguidance", "rich"} & {
        path.name for path in folder.iterdir()
    }
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bundle") / "small"
    runnable.write_bundle(root)
    return root


def run(bare: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{bare}"}
    command = [sys.executable, "-S", "-P", "-m", "pocketmoe", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=HANG_S)


def test_a_device_needs_no_extra(bare: Path, bundle: Path) -> None:
    """Verifying, looking and answering work with what the package itself asks for."""
    assert run(bare, "verify", str(bundle)).returncode == 0
    assert json.loads(run(bare, "inspect", str(bundle), "--json").stdout)
    done = run(bare, "run", str(bundle), "-p", "a b", "--raw", "--max-tokens", "3", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["generated_tokens"] == 3
    told = run(bare, "--version")
    assert told.returncode == 0
    assert told.stdout.startswith("pocketmoe, version ")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("export", ["export", "nothing", "-o", "{out}"]),
        ("export", ["quantize", "{bundle}", "-o", "{out}", "--scheme", "int4"]),
        ("export", ["export-portable", "{bundle}", "-o", "{out}"]),
        ("serve", ["serve", "{bundle}"]),
        ("grammar", ["run", "{bundle}", "-p", "a", "--json-schema", "{{}}"]),
    ],
)
def test_what_needs_an_extra_says_how_to_install_it(
    extra: str, words: list[str], bare: Path, bundle: Path, tmp_path: Path
) -> None:
    """Exit code 3, one line, and nothing is written."""
    done = run(bare, *(word.format(bundle=bundle, out=tmp_path / "out") for word in words))
    assert done.returncode == 3, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert re.search(rf"pip install .*\[{extra}\]'", line), line
    assert not (tmp_path / "out").exists()
