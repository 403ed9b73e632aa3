"""Optimisers of the reference run: Muon for the matrices inside the layers, AdamW for everything else.

Muon replaces the momentum of a matrix by (roughly) its nearest semi-orthogonal matrix. In a short run it
needs clearly fewer tokens than AdamW alone; experts are handled as a batch of matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import OlmoeForCausalLM

ADAM_ONLY = ("embed_tokens", "lm_head", "mlp.gate.weight")
ROUTER_RATE = 0.4
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """Newton-Schulz iteration on (N, rows, columns): singular values move close to one."""
    found = matrices.to(torch.bfloat16)
    tall = found.shape[-2] > found.shape[-1]
    if tall:
        found = found.transpose(-1, -2).contiguous()
    found = found / (found.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = QUINTIC
    for _ in range(rounds):
        gram = found @ found.transpose(-1, -2)
        found = a * found + (b * gram + c * gram @ gram) @ found
    return (found.transpose(-1, -2) if tall else found).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised per matrix, scaled so that its root mean square is 0.2 like AdamW's steps."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float, decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One update of every matrix, or stack of matrices (N, rows, columns)."""
        if closure is not None:
            raise ValueError("a closure is not supported")
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                looked_ahead = parameter.grad.lerp(momentum, group["momentum"])
                rows, columns = parameter.shape[-2:]
                if parameter.dim() == 3 and rows < columns:
                    rows //= 2  # the gate and up halves of the experts are matrices of their own
                update = orthogonalise(looked_ahead.view(-1, rows, columns)).view_as(parameter)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(rows, columns)))


def make_optimizers(
    model: OlmoeForCausalLM, rate: float, matrix_rate: float, decay: float
) -> list[torch.optim.Optimizer]:
    """[AdamW, Muon]; every group carries ``peak``, the learning rate it has at the plateau."""
    matrices, routers, tables, vectors = [], [], [], []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            vectors.append(parameter)
        elif "mlp.gate.weight" in name:
            routers.append(parameter)
        elif any(part in name for part in ADAM_ONLY):
            tables.append(parameter)
        else:
            matrices.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": tables, "peak": rate, "weight_decay": decay},
        {"params": routers, "peak": rate * ROUTER_RATE, "weight_decay": decay},
        {"params": vectors, "peak": rate, "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8, fused=True)
    muon = Muon(matrices, matrix_rate, 0.95, decay)
    muon.param_groups[0]["peak"] = matrix_rate
    return [adam, muon]


def state_tensors(model: OlmoeForCausalLM, optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """Parameters and optimiser state by name, for saving."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model|{name}"] = parameter.detach()
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{key}|{name}"] = value
    return tensors


@torch.no_grad()
def restore(model: OlmoeForCausalLM, optimizers: list[torch.optim.Optimizer], tensors: dict[str, torch.Tensor]) -> None:
    """Put back what :func:`state_tensors` gave."""
    parameters = dict(model.named_parameters())
    owner = {id(p): o for o in optimizers for g in o.param_groups for p in g["params"]}
    for full, value in tensors.items():
        key, name = full.split("|", 1)
        parameter = parameters[name]
        if key == "model":
            parameter.copy_(value)
        else:
            owner[id(parameter)].state[parameter][key] = value
