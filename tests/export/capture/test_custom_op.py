"""The custom operator finds experts by what they are, and registers itself once and only when asked."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pocketmoe.export.capture import custom_op
from tests import tiny


def test_importing_the_export_registers_nothing() -> None:
    code = (
        "import pocketmoe.export.convert, pocketmoe.export.capture.custom_op\n"
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS\n"
        "assert 'pocketmoe' not in ALL_EXPERTS_FUNCTIONS\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.filterwarnings("ignore")
def test_experts_are_found_in_forward_order() -> None:
    custom_op.install()
    custom_op.install()
    with torch.device("meta"):
        model = tiny.make_model("deepseek_v3")
    assert list(custom_op.find_experts(model)) == ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]
    with torch.device("meta"):
        assert custom_op.find_experts(tiny.make_model("llama")) == {}


@pytest.mark.filterwarnings("ignore")
def test_the_model_is_as_before_after_the_capture() -> None:
    model = tiny.make_model("olmoe")
    ids = torch.tensor([[5, 6, 7]])
    experts = custom_op.find_experts(model)
    with torch.no_grad():
        before = model(ids).logits
        with custom_op.experts_as_operator(model, experts):
            assert not list(next(iter(experts.values())).module.parameters())
            assert not torch.equal(model(ids).logits, before)
        assert torch.equal(model(ids).logits, before)
