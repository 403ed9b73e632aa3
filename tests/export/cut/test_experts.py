"""What an experts module computes is checked before its weights are stored."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.moe import use_experts_implementation

from pocketmoe.bundle.manifest import ExpertKind
from pocketmoe.bundle.store import ExpertId
from pocketmoe.bundle.stream import ExpertSource
from pocketmoe.errors import UnsupportedModel
from pocketmoe.export.capture.adapters import MoeModule
from pocketmoe.export.cut.experts import prepare_experts


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


def prepare(module: torch.nn.Module, root: Path) -> tuple[tuple[ExpertKind, ...], ExpertSource]:
    (root / "graphs").mkdir()
    kinds, experts, *_ = prepare_experts([MoeModule.of("moe", module, 16)], _Weights(module), root)  # type: ignore[arg-type]
    return kinds, experts


def test_a_record_holds_an_experts_weights_as_the_kind_says(tmp_path: Path) -> None:
    """Matrices are [inputs, outputs], each at its place."""
    module = _Experts(SimpleNamespace(), weigh_input=False)
    (kind,), experts = prepare(module, tmp_path)
    assert experts.kind_of == {ExpertId(0, 0): 0, ExpertId(0, 1): 0}
    record = experts.read(ExpertId(0, 1))
    assert len(record) == kind.nbytes
    for tensor in kind.tensors:
        found = torch.frombuffer(record, dtype=torch.float32, count=tensor.nbytes // 4, offset=tensor.offset)
        assert torch.equal(found.view(tensor.shape), module.get_parameter(tensor.name)[1].T)


def test_routing_weights_on_the_input_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="weighted sum"):
        prepare(_Experts(SimpleNamespace(), weigh_input=True), tmp_path)


def test_experts_of_an_unknown_form_are_refused() -> None:
    module = _Experts(SimpleNamespace(), weigh_input=False)
    module.register_parameter("surprise", torch.nn.Parameter(torch.zeros(2, 3)))
    with pytest.raises(UnsupportedModel, match="surprise"):
        MoeModule.of("moe", module, 16)


@use_experts_implementation(has_gate=False, has_bias=True, is_transposed=True, has_post_expert_norm=True)
class _NormedExperts(torch.nn.Module):
    """Experts without gate, with biases, stored the other way round, and a norm after each."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.num_experts = 3
        self.up_proj, self.up_proj_bias = (torch.nn.Parameter(torch.randn(3, *s)) for s in ((16, 16), (16,)))
        self.down_proj, self.down_proj_bias = (torch.nn.Parameter(torch.randn(3, *s)) for s in ((16, 16), (16,)))
        self.post_expert_norm = torch.nn.RMSNorm(16)
        torch.nn.init.uniform_(self.post_expert_norm.weight, 0.5, 1.5)
        self.act_fn = torch.nn.GELU()

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(hidden)
        for row in range(len(hidden)):
            for expert, weight in zip(ids[row], weights[row], strict=True):
                x = self.act_fn(hidden[row] @ self.up_proj[expert] + self.up_proj_bias[expert])
                y = self.post_expert_norm(x @ self.down_proj[expert] + self.down_proj_bias[expert])
                result[row] += y * weight
        return result


def test_the_form_follows_the_flags(tmp_path: Path) -> None:
    """Biases, no gate, square matrices stored the other way round, a norm: checked against the module, and stored."""
    module = _NormedExperts(SimpleNamespace())
    _, experts = prepare(module, tmp_path)
    records = [bytes(experts.read(ExpertId(0, expert))) for expert in range(3)]
    assert len({*records}) == 3
    for record in records:
        assert module.post_expert_norm.weight.detach().numpy().tobytes() in record
