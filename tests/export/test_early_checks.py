"""What an export refuses at once: by names, headers and config.json, before torch is imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pocketmoe.export.early_checks import is_dense
from tests.hang import HANG_S

CALL = """
import json, sys
from click.testing import CliRunner
from pocketmoe.cli import main
for arguments in json.load(sys.stdin):
    done = CliRunner().invoke(main, arguments)
    print(json.dumps([done.exit_code, done.stderr, "torch" in sys.modules]))
"""


def changed(source: Path, target: Path, without: tuple[str, ...] = (), **settings: object) -> Path:
    """A copy without some files, and with other settings."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*without))
    config = target / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    return target


def dense(source: Path, target: Path) -> Path:
    """A checkpoint in which nothing speaks of experts."""
    import torch
    from safetensors.torch import save_file

    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((source / "config.json").read_text())
    kept = {name: value for name, value in config.items() if "expert" not in name and "router" not in name}
    (target / "config.json").write_text(json.dumps(kept | {"model_type": "qwen3"}))
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(8, 4)}, target / "model.safetensors")
    return target


def test_a_refusal_does_not_wait_for_torch(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Each in a line of its own, with exit code 3, and nothing left where the bundle was to go."""
    good = tiny_checkpoint("olmoe")
    pickled = changed(good, tmp_path / "pickled", without=("*.safetensors",))
    (pickled / "pytorch_model.bin").write_bytes(b"pickle")
    cut = changed(good, tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    out = tmp_path / "out"
    cases: list[tuple[Path, Path, tuple[str, ...], str]] = [
        (good, foreign, (), "thesis.txt"),
        (good, foreign / "thesis.txt", (), "is not a PocketMoE bundle"),
        (good, Path("/proc/no-bundle"), (), "cannot be written"),
        (changed(good, tmp_path / "silent", without=("tokenizer*",)), out, (), "has no tokenizer.json"),
        (pickled, out, (), "safetensors"),
        (cut, out, (), "not a whole safetensors file"),
        (dense(good, tmp_path / "dense"), out, (), "dense model"),
        (good, out, ("--scheme", "int5"), "int5"),
        (good, out, ("--scheme", "mixed"), "pocketmoe quantize"),
        (changed(good, tmp_path / "huge", num_hidden_layers=10**9), out, (), "num_hidden_layers"),
        (tmp_path / "nowhere", out, (), "neither a directory"),
    ]
    commands = [["export", str(source), "-o", str(target), *options] for source, target, options, _ in cases]
    done = subprocess.run(
        [sys.executable, "-c", CALL],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=True,
    )
    for (source, _, _, words), line in zip(cases, done.stdout.splitlines(), strict=True):
        code, said, torch_is_there = json.loads(line)
        assert (code, torch_is_there) == (2 if words == "int5" else 3, False), (source, said)
        assert words in said.splitlines()[-1], (source, said)
    assert not out.exists()
    assert sorted(path.name for path in foreign.iterdir()) == ["thesis.txt"]
    assert not list(tmp_path.glob(".pocketmoe-*"))


@pytest.mark.parametrize(
    ("settings", "tensors"),
    [
        ({"num_experts": 8}, {}),
        ({"model_type": "jetmoe"}, {}),
        ({"text_config": {"num_local_experts": 8}}, {}),
        ({}, {"model.layers.0.block_sparse_moe.router.weight": (8, 64)}),
        ({}, {"model.layers.0.feed_forward.weight": (8, 64, 32)}),
    ],
    ids=["setting", "type", "nested", "name", "shape"],
)
def test_any_sign_of_experts_is_enough(settings: dict[str, object], tensors: dict[str, tuple[int, ...]]) -> None:
    """Only a model in which nothing at all speaks of them is refused without being built."""
    plain = {"hidden_size": 64, "num_hidden_layers": 2, "model_type": "llama"}
    weights = {"model.layers.0.mlp.up_proj.weight": (128, 64)}
    assert is_dense(plain, weights)
    assert not is_dense(plain | settings, weights | tensors)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe", "jamba"])
def test_the_defaults_of_known_mixtures_are_no_dense_model(model_type: str) -> None:
    """As transformers writes their configuration, without weights."""
    from transformers import CONFIG_MAPPING

    assert not is_dense(json.loads(CONFIG_MAPPING[model_type]().to_json_string()), {})
