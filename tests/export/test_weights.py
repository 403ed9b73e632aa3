"""Weights read piece by piece are those that transformers loads as a whole, in every layout of checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pocketmoe.export.checkpoint import Checkpoint
from pocketmoe.export.weights import load_model
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers loading the tiny models


def assert_same_weights(root: Path) -> None:
    expected: dict[str, Any] = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32).state_dict()
    model, weights, experts = load_model(Checkpoint(root))
    streamed = {f"{name}.{p}" for name, module in experts.items() for p in module._parameters}
    assert streamed
    assert weights.unused == []
    for name, tensor in model.state_dict().items():
        if name not in streamed:
            assert torch.equal(tensor, expected[name]), name
            continue
        assert tensor.is_meta, "experts must stay out of memory"
        for expert in range(len(tensor)):
            assert torch.equal(weights.load_expert(name, expert, len(tensor)), expected[name][expert]), name
    for name, buffer in AutoModelForCausalLM.from_pretrained(root).named_buffers():
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
