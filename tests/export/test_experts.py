"""What an experts module computes is checked before its weights are stored."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.moe import use_experts_implementation

from pocketmoe.bundle import no_progress
from pocketmoe.errors import UnsupportedModel
from pocketmoe.export.experts import write_experts
from pocketmoe.export.forms import MoeModule


@use_experts_implementation
class _Experts(torch.nn.Module):
    """Two gated experts; `weigh_input` applies the routing weight before the expert, as some architectures do."""

    def __init__(self, config: SimpleNamespace, weigh_input: bool) -> None:
        super().__init__()
        self.num_experts, self.weigh_input = 2, weigh_input
        self.gate_up_proj = torch.nn.Parameter(torch.randn(2, 24, 16))
        self.down_proj = torch.nn.Parameter(torch.randn(2, 16, 12))
        self.act_fn = torch.nn.SiLU()

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(hidden)
        for row in range(len(hidden)):
            for expert, weight in zip(ids[row], weights[row], strict=True):
                x = hidden[row] * weight if self.weigh_input else hidden[row]
                y = self.down_proj[expert] @ self._apply_gate(self.gate_up_proj[expert] @ x)  # type: ignore[operator]
                result[row] += y if self.weigh_input else y * weight
        return result


class _Weights:
    """The weights of such a module in memory."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def load_expert(self, moe: MoeModule, tensor: str, expert: int) -> torch.Tensor:
        return self.module.get_parameter(tensor)[expert].detach()


def write(module: torch.nn.Module, root: Path) -> None:
    (root / "graphs").mkdir()
    write_experts([MoeModule.of("moe", module, 16)], _Weights(module), root, no_progress)  # type: ignore[arg-type]


def test_a_weighted_sum_of_experts_is_stored(tmp_path: Path) -> None:
    write(_Experts(SimpleNamespace(), weigh_input=False), tmp_path)
    assert (tmp_path / "experts.bin").stat().st_size > 0


def test_routing_weights_on_the_input_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="weighted sum"):
        write(_Experts(SimpleNamespace(), weigh_input=True), tmp_path)
    assert not (tmp_path / "experts.bin").exists()


def test_experts_of_an_unknown_form_are_refused() -> None:
    module = _Experts(SimpleNamespace(), weigh_input=False)
    module.register_parameter("surprise", torch.nn.Parameter(torch.zeros(2, 3)))
    with pytest.raises(UnsupportedModel, match="surprise"):
        MoeModule.of("moe", module, 16)
