"""A CPU-friendly training kernel for the experts of an ``OlmoeForCausalLM``.

The stock experts functions of transformers allocate several (pairs x hidden) temporaries per layer. This one
sorts the (token, expert) pairs once, multiplies contiguous slices into preallocated outputs, and applies the
routing weight on the narrow side (ffn instead of hidden). The mathematics is unchanged, so the checkpoint is
an ordinary OLMoE one and runs with any experts implementation.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "sorted_mm"


class SortedExperts(torch.autograd.Function):
    """SwiGLU experts over pairs sorted by expert, with a hand-written backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        order: torch.Tensor,
        bounds: list[int],
    ) -> torch.Tensor:
        """Run all experts.

        hidden (T, H); weights (T, K); gate_up (E, 2F, H); down (E, H, F); order (T*K,) sorts the flattened
        pairs by expert; bounds (E+1) are the slice limits of the experts in the sorted pairs. Returns (T, H).
        """
        top_k = weights.shape[1]
        token = order // top_k
        inputs = hidden.index_select(0, token)
        scale = weights.reshape(-1).index_select(0, order).unsqueeze(1)
        gated = inputs.new_empty(len(order), gate_up.shape[1])
        _per_expert(inputs, gate_up.transpose(1, 2), gated, bounds)
        gate, up = gated.chunk(2, dim=-1)
        active = functional.silu(gate).mul_(up)
        outputs = inputs.new_empty(len(order), hidden.shape[1])
        _per_expert(active * scale, down.transpose(1, 2), outputs, bounds)
        ctx.save_for_backward(inputs, gated, active, scale, gate_up, down, order, token)
        ctx.bounds, ctx.top_k = bounds, top_k
        return _gather_sum(outputs, order, top_k)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients for hidden, weights, gate_up and down; shapes as in :meth:`forward`."""
        inputs, gated, active, scale, gate_up, down, order, token = ctx.saved_tensors
        bounds, top_k = ctx.bounds, ctx.top_k
        grad_out = grads[0].index_select(0, token)
        grad_scaled = torch.empty_like(active)
        _per_expert(grad_out, down, grad_scaled, bounds)
        grad_down = torch.empty_like(down)
        _outer_per_expert(grad_out, active * scale, grad_down, bounds)
        grad_weights = torch.empty(len(order), dtype=scale.dtype)
        grad_weights[order] = (grad_scaled * active).sum(-1).to(scale.dtype)
        grad_active = grad_scaled.mul_(scale)
        gate, up = gated.chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        grad_gated = torch.empty_like(gated)
        silu = gate * sigmoid
        grad_gated[:, gate.shape[1] :] = grad_active * silu
        slope = sigmoid.add_(silu - silu * sigmoid)
        grad_gated[:, : gate.shape[1]] = slope.mul_(grad_active).mul_(up)
        grad_gate_up = torch.empty_like(gate_up)
        _outer_per_expert(grad_gated, inputs, grad_gate_up, bounds)
        grad_inputs = grad_out
        _per_expert(grad_gated, gate_up, grad_inputs, bounds)
        grad_hidden = _gather_sum(grad_inputs, order, top_k)
        return grad_hidden, grad_weights.view(-1, top_k), grad_gate_up, grad_down, None, None


def _per_expert(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, bounds: list[int]) -> None:
    """out[slice e] = left[slice e] @ right[e]; left (S, A), right (E, A, B), out (S, B)."""
    for expert, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if stop > start:
            torch.mm(left[start:stop], right[expert], out=out[start:stop])


def _outer_per_expert(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, bounds: list[int]) -> None:
    """out[e] = left[slice e].T @ right[slice e]; left (S, A), right (S, B), out (E, A, B)."""
    for expert, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if stop > start:
            torch.mm(left[start:stop].t(), right[start:stop], out=out[expert])
        else:
            out[expert].zero_()


def _gather_sum(sorted_rows: torch.Tensor, order: torch.Tensor, top_k: int) -> torch.Tensor:
    """Undo the sort and add up the K rows of each token: (T*K, H) -> (T, H)."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    # embedding_bag gathers and sums in one pass, without the (T*K, H) temporary
    return functional.embedding_bag(inverse.view(-1, top_k), sorted_rows, mode="sum")


def sorted_experts_forward(
    module: torch.nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The transformers experts interface: hidden (T, H), index and weights (T, K) -> (T, H)."""
    flat = top_k_index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=module.gate_up_proj.shape[0])
    bounds = [0, *counts.cumsum(0).tolist()]
    dtype = torch.float32  # measured: bf16 outside the experts and fp32 inside is the fastest mix on this CPU
    with torch.autocast("cpu", enabled=False):
        out = SortedExperts.apply(
            hidden.to(dtype),
            top_k_weights.to(dtype),
            module.gate_up_proj.to(dtype),
            module.down_proj.to(dtype),
            order,
            bounds,
        )
    return out.to(hidden.dtype)


def register() -> str:
    """Make the kernel known to transformers; returns the name for ``set_experts_implementation``."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, sorted_experts_forward)
    return NAME
