"""Hub ids, against a server on this machine that answers as the hub does; each call in a process of its own, since
huggingface_hub reads its settings once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import BadInput
from pocketmoe.export.checkpoint.hub import find
from tests.export.hub_server import COMMIT, MODEL, Hub
from tests.hang import HANG_S

CALL = """
import json, sys
from pocketmoe.errors import PocketMoEError
from pocketmoe.export.checkpoint.hub import find
steps = []
try:
    name, revision, code = json.loads(sys.argv[1])
    print(json.dumps([str(find(name, revision=revision, code=code, progress=lambda *s: steps.append(s))), steps]))
except PocketMoEError as error:
    print(error.one_line())
    sys.exit(error.exit_code)
assert "torch" not in sys.modules
"""


@dataclass
class Machine:
    """A user's machine: its cache, and how it reaches the hub."""

    hub: Hub
    home: Path
    offline: bool = False
    unreachable: bool = False
    steps: list[tuple[str, int, int]] = field(default_factory=list[tuple[str, int, int]])  # of the last `find`

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_HOME": str(self.home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
        environment["HF_ENDPOINT"] = "http://127.0.0.1:9" if self.unreachable else self.hub.url
        if self.offline:
            environment["HF_HUB_OFFLINE"] = "1"
        return subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, env=environment, timeout=HANG_S, check=False
        )

    def find(self, name: str = MODEL, revision: str | None = None, code: bool = False) -> Path:
        done = self.run("-c", CALL, json.dumps([name, revision, code]))
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr == ""
        root, self.steps = json.loads(done.stdout)
        return Path(root)

    def refused(self, name: str = MODEL, revision: str | None = None, before: str = "") -> str:
        """The one line of an error with exit code 3; `before`: what the process does first."""
        done = self.run("-c", before + CALL, json.dumps([name, revision, False]))
        assert done.returncode == 3, done.stdout + done.stderr
        assert done.stderr == ""
        assert done.stdout.count("\n") == 1
        return done.stdout

    def asked_for(self) -> set[str]:
        """The files whose content was asked for."""
        return {
            path.rpartition("/")[2] for method, path, _ in self.hub.requests if method == "GET" and "resolve" in path
        }


@pytest.fixture
def machine(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Iterator[Machine]:
    """A hub with the tiny OLMoE, code, a pickle, and the same weights once more; and a machine that has nothing yet."""
    model = Path(shutil.copytree(tiny_checkpoint("olmoe"), tmp_path / "model"))
    (model / "modeling_tiny.py").write_text("raise SystemExit('was run')")
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    (model / "consolidated.safetensors").write_bytes(b"the same weights")
    (model / "onnx").mkdir()
    (model / "onnx/model.json").write_text("{}")
    hub = Hub(model)
    yield Machine(hub, tmp_path / "home")
    hub.shutdown()
    hub.server_close()


def test_an_id_becomes_the_directory_of_its_commit(machine: Machine) -> None:
    """Only what an export reads is downloaded, once; then the cache serves offline and without network alike."""
    root = machine.find()
    assert root.name == COMMIT
    wanted = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    wanted |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert machine.asked_for() == {path.name for path in root.iterdir()} == wanted
    assert (root / "model.safetensors").read_bytes() == (machine.hub.directory / "model.safetensors").read_bytes()
    total = round((root / "model.safetensors").stat().st_size // 10**6)
    assert machine.steps[-1][0] == f"downloading {MODEL} (MB)"
    assert machine.steps[-1][1] == machine.steps[-1][2] == total
    machine.hub.requests.clear()
    assert machine.find() == machine.find(revision="v1") == machine.find(revision=COMMIT) == root
    assert machine.asked_for() == set()
    machine.unreachable = True
    assert machine.find() == root
    machine.hub.requests.clear()
    machine.offline = True
    assert machine.find() == machine.find(revision="v1") == root
    assert machine.hub.requests == []


def test_code_is_downloaded_only_when_asked_for(machine: Machine) -> None:
    assert (machine.find(code=True) / "modeling_tiny.py").is_file()


def test_a_download_that_breaks_off_goes_on(machine: Machine) -> None:
    """The error says so; the next call asks for what is not there yet."""
    machine.hub.cut = "model.safetensors"
    line = machine.refused()
    assert "broke off" in line
    assert "Run the same command again" in line
    before = machine.asked_for()
    machine.hub.cut = None
    machine.hub.requests.clear()
    root = machine.find()
    assert "model.safetensors" in machine.asked_for()
    assert machine.asked_for() != before
    assert (root / "model.safetensors").read_bytes() == (machine.hub.directory / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("someone/gated", ["is gated", "https://huggingface.co/someone/gated", "hf auth login"]),
        ("someone/private", ["no directory here", "hf auth login"]),
        ("someone/unknown", ["no directory here", "Check the name"]),
        ("someone/down", ["answers 503", "Try again later"]),
    ],
)
def test_what_the_hub_refuses_is_one_line(machine: Machine, name: str, words: list[str]) -> None:
    line = machine.refused(name)
    for word in [name, *words]:
        assert word in line


def test_an_unknown_revision(machine: Machine) -> None:
    assert "no revision 'v9'" in machine.refused(revision="v9")


def test_a_model_without_safetensors(machine: Machine) -> None:
    """It is refused before anything is downloaded."""
    for path in machine.hub.directory.glob("*.safetensors"):
        path.unlink()
    assert "no weights as safetensors" in machine.refused()
    assert machine.asked_for() == set()


@pytest.mark.parametrize("offline", [True, False])
def test_no_network_and_nothing_cached(machine: Machine, offline: bool) -> None:
    machine.offline, machine.unreachable = offline, True
    line = machine.refused()
    assert "not in the hub's cache" in line
    assert "name its directory" in line


def test_a_full_disk(machine: Machine, tmp_path: Path) -> None:
    """What is missing is compared with what is free before the download; running full on the way is said too."""
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("cannot mount a small file system here")
    try:
        machine.home = small / "home"
        line = machine.refused()
        assert "GB are free" in line
        assert "Free some space" in line
        assert machine.asked_for() == set()
        line = machine.refused(before="from pocketmoe.export.checkpoint import hub; hub.check_space = lambda *_: None")
        assert "the disk is full" in line
        assert "Free some space" in line
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("name", ["nowhere", "./nowhere/x", "/nowhere/x", "a/b/c", "../x/y", "", "https://hub/x"])
def test_neither_path_nor_id(name: str) -> None:
    with pytest.raises(BadInput, match="neither a directory that exists nor a hub id") as caught:
        find(name)
    assert caught.value.exit_code == 3


def test_a_path_wins_over_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of that name is taken without asking anybody, and has no revisions."""
    (tmp_path / MODEL).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find(MODEL) == Path(MODEL)
    with pytest.raises(BadInput, match="no revisions"):
        find(MODEL, revision="main")


def test_the_bundle_names_model_and_commit(machine: Machine, tmp_path: Path) -> None:
    """From the command line; revision, licence, base model and datasets are in the manifest, and inspect shows them."""
    card = "---\nlicense: other\nlicense_name: tiny-1.0\nlicense_link: https://example.org/tiny\n"
    card += "base_model:\n- someone/base\n- someone/else\ndatasets: [a/b, c/d]\n---\n# Tiny\n"
    (machine.hub.directory / "README.md").write_text(card)
    target = tmp_path / "bundle"
    done = machine.run("-m", "pocketmoe.cli", "export", MODEL, "-o", str(target), "--revision", "v1")
    assert done.returncode == 0, done.stderr
    provenance = Bundle.open(target).manifest.provenance
    assert (provenance.source, provenance.revision) == (MODEL, COMMIT)
    assert (provenance.licence, provenance.licence_name) == ("other", "tiny-1.0")
    assert provenance.licence_link == "https://example.org/tiny"
    assert provenance.base_model == "someone/base, someone/else"
    assert provenance.datasets == ("a/b", "c/d")
    shown = machine.run("-m", "pocketmoe.cli", "inspect", str(target)).stdout
    for text in (f"{MODEL} at {COMMIT}", "tiny-1.0", "https://example.org/tiny", "someone/base", "a/b, c/d"):
        assert text in shown
