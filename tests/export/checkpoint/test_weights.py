"""Weights read piece by piece are those that transformers loads as a whole, in every layout of checkpoint."""

# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config

from pocketmoe.export.checkpoint.checkpoint import Checkpoint
from pocketmoe.export.checkpoint.weights import load_model
from pocketmoe.export.convert import left_out
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers loading the tiny models


def assert_same_weights(root: Path, **options: Any) -> None:
    whole: Any = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32, **options)
    expected: dict[str, Any] = whole.state_dict()
    model, weights, experts = load_model(Checkpoint(root))
    streamed = {moe.parameter(tensor, 0)[0]: (moe, tensor) for moe in experts.values() for tensor in moe.shapes}
    assert streamed
    assert weights.unused == []
    for name, tensor in model.state_dict().items():
        if name not in streamed:
            assert torch.equal(tensor, expected[name]), name
            continue
        assert tensor.is_meta, "experts must stay out of memory"
        for expert in range(len(tensor)):
            assert torch.equal(weights.load_expert(*streamed[name], expert), expected[name][expert]), name
    for name, buffer in whole.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name


@pytest.mark.parametrize("model_type", sorted(set(tiny.CONFIGS) - {"llama"}))
def test_as_transformers_loads_them(model_type: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    assert_same_weights(tiny_checkpoint(model_type))


@pytest.mark.parametrize("per_expert", [True, False])
def test_sharded_in_both_layouts_of_experts(per_expert: bool, tmp_path: Path) -> None:
    tiny.save_checkpoint(tmp_path, tiny.make_model("olmoe"), save_original_format=per_expert, max_shard_size="300KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    keys = [key for shard in shards for key in load_file(shard)]
    assert any(".experts.0." in key for key in keys) == per_expert
    assert_same_weights(tmp_path)


def test_half_precision_is_widened(tmp_path: Path) -> None:
    tiny.save_checkpoint(tmp_path, tiny.make_model("olmoe").to(torch.bfloat16))
    assert_same_weights(tmp_path)


def test_four_bit_experts_are_read_as_numbers(tmp_path: Path) -> None:
    """gpt-oss is published like this (MXFP4): 32 numbers of four bits share a power of two."""
    tiny.save_checkpoint(tmp_path, tiny.make_model("gpt_oss"))
    tensors = load_file(tmp_path / "model.safetensors")
    random = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        n_experts, inputs, outputs = tensors.pop(name).shape
        groups = (n_experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*groups, 16), generator=random, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 126, groups, generator=random, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_weights(tmp_path, quantization_config=Mxfp4Config(dequantize=True))


def test_heads_that_predict_further_tokens_are_noted(tmp_path: Path) -> None:
    tiny.save_checkpoint(tmp_path, tiny.make_model("deepseek_v3"))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(64, 128)
    tensors["model.layers.3.mlp.experts.0.up_proj.weight"] = torch.zeros(32, 64)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(tmp_path)
    _, weights, _ = load_model(checkpoint)
    assert left_out(checkpoint, weights.unused) == (
        "multi-token-prediction heads are left out (2 tensors, such as model.layers.3.eh_proj.weight)",
    )
