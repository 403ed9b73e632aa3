"""Checkpoints that cannot be used are refused with one line that names the file and a remedy."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pocketmoe.errors import BadInput, DamagedFile, UnsupportedModel
from pocketmoe.export import convert
from pocketmoe.export.checkpoint.checkpoint import Checkpoint
from pocketmoe.export.checkpoint.weights import load_model
from pocketmoe.export.convert import export_checkpoint
from pocketmoe.export.tensors.shards import INDEX, SINGLE
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers loading the tiny models

GATE = "model.layers.1.mlp.gate.weight"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny OLMoE that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint("olmoe"), tmp_path / "checkpoint"))


def refused(root: Path, kind: type[BadInput], *words: str) -> None:
    """Export refuses the checkpoint with an error of this kind and these words, and writes nothing."""
    target = root.parent / "bundle"
    with pytest.raises(kind) as caught:
        export_checkpoint(root, target)
    line = caught.value.one_line()
    assert caught.value.exit_code == 3
    assert caught.value.remedy
    assert str(root) in line
    for word in words:
        assert word in line
    assert not target.exists()
    assert not list(root.parent.glob(".bundle*"))


def edit_config(root: Path, **changes: Any) -> None:
    path = root / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(root: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(root / SINGLE)
    edit(tensors)
    save_file(tensors, root / SINGLE)


def test_no_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    refused(checkpoint, BadInput, "config.json")


def test_config_that_is_no_json(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("{")
    refused(checkpoint, DamagedFile, "config.json")


def test_unknown_model_type(checkpoint: Path) -> None:
    edit_config(checkpoint, model_type="quantum_moe")
    refused(checkpoint, UnsupportedModel, "quantum_moe")


def test_code_in_a_checkpoint_is_never_run(checkpoint: Path) -> None:
    (checkpoint / "evil.py").write_text("raise SystemExit('was run')")
    edit_config(checkpoint, model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    refused(checkpoint, UnsupportedModel, "evil", "--trust-remote-code")


CODE = """
from transformers import OlmoeConfig, OlmoeForCausalLM

class Config(OlmoeConfig):
    model_type = "olmoe_of_ours"

class Model(OlmoeForCausalLM):
    config_class = Config
"""


def test_code_in_a_checkpoint_is_run_when_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only where transformers lacks the model; its files count as the checkpoint's, and the notes name them."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    tiny.save_checkpoint(tmp_path / "checkpoint", tiny.make_model("olmoe"), save_original_format=False)
    (tmp_path / "checkpoint/code.py").write_text(CODE)
    maps = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    assert not Checkpoint(tmp_path / "checkpoint", run_its_code=True).ran_code
    edit_config(tmp_path / "checkpoint", model_type="olmoe_of_ours", auto_map=maps)
    checkpoint = Checkpoint(tmp_path / "checkpoint", run_its_code=True)
    model, weights, experts = load_model(checkpoint)
    assert type(model).__name__ == "Model"
    assert len(experts) == 4
    assert weights.unused == []
    assert tmp_path / "checkpoint/code.py" in checkpoint.stamps
    (note,) = convert.notes(checkpoint, weights)
    assert "(--trust-remote-code): code.py" in note


def test_quantized_already(checkpoint: Path) -> None:
    edit_config(checkpoint, quantization_config={"quant_method": "gptq"})
    edit_tensors(checkpoint, lambda tensors: tensors.update({GATE: tensors[GATE].to(torch.int32)}))
    refused(checkpoint, UnsupportedModel, "gptq", GATE, "I32")


def test_not_a_mixture_of_experts(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "checkpoint"))
    refused(root, UnsupportedModel, "LlamaForCausalLM", "no routed experts")


@pytest.mark.parametrize("name", [GATE, EXPERT, "model.embed_tokens.weight"])
def test_missing_tensor(checkpoint: Path, name: str) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.pop(name))
    refused(checkpoint, BadInput, "layers.1.mlp" if "layers" in name else name)


@pytest.mark.parametrize("name", [GATE, EXPERT])
def test_wrong_shape(checkpoint: Path, name: str) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.update({name: torch.zeros(5, 7)}))
    refused(checkpoint, BadInput, "layers.1.mlp")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(checkpoint: Path, value: float) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors[GATE].view(-1)[3:4].fill_(value))
    refused(checkpoint, BadInput, GATE, "NaN")


def test_an_expert_that_is_no_number(checkpoint: Path) -> None:
    """Experts are read after the capture, so this asks the reader rather than a whole export."""
    edit_tensors(checkpoint, lambda tensors: tensors[EXPERT].view(-1)[3:4].fill_(float("nan")))
    with pytest.raises(BadInput, match=EXPERT):
        Checkpoint(checkpoint).read(EXPERT)


def test_truncated_shard(checkpoint: Path) -> None:
    path = checkpoint / SINGLE
    path.write_bytes(path.read_bytes()[:-1000])
    refused(checkpoint, DamagedFile, SINGLE)


def test_garbage_shard(checkpoint: Path) -> None:
    (checkpoint / SINGLE).write_bytes(b"\xff" * 4096)
    refused(checkpoint, DamagedFile, SINGLE)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "sub/a.safetensors", "a.bin", "", 3, "..\\a"])
def test_index_that_leaves_the_directory(checkpoint: Path, name: Any) -> None:
    (checkpoint / SINGLE).unlink()
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {GATE: name}}))
    refused(checkpoint, DamagedFile, INDEX)


def test_index_names_a_missing_shard(checkpoint: Path) -> None:
    (checkpoint / SINGLE).unlink()
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {GATE: "model-00002-of-00002.safetensors"}}))
    refused(checkpoint, DamagedFile, INDEX, "model-00002-of-00002.safetensors")


def test_pickles_are_not_read(checkpoint: Path) -> None:
    (checkpoint / SINGLE).rename(checkpoint / "pytorch_model.bin")
    refused(checkpoint, BadInput, "pickle")


def test_no_tokenizer(checkpoint: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    refused(checkpoint, BadInput, "tokenizer.json")


def test_a_shard_that_is_replaced_meanwhile_is_noticed(checkpoint: Path) -> None:
    """It happened: a training run wrote its next snapshot during an export, and the bundle mixed the two."""
    opened = Checkpoint(checkpoint)
    opened.check_unchanged()
    (checkpoint / "new").write_bytes((checkpoint / SINGLE).read_bytes())
    (checkpoint / "new").rename(checkpoint / SINGLE)
    with pytest.raises(BadInput, match="changed while it was being read"):
        opened.check_unchanged()
