"""Forms of MoE modules of transformers that do not go through its experts interface.

They are written the way a user's own would be (`forms.register`), but under their class's name: nothing is imported
for models that are not asked for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from pocketmoe.errors import UnsupportedModel
from pocketmoe.export.forms import Experts, ExpertsForm, Tensors


def _llama4_forward(module: Any, experts: Experts, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The score scales what goes into the expert, which with one expert per token is a matter of its x."""
    if module.top_k != 1:
        raise UnsupportedModel(f"Llama-4 with {module.top_k} experts per token weighs each expert's input apart")
    x = hidden_states.reshape(-1, module.hidden_dim)
    logits = F.linear(x, module.router.weight)
    score, expert_ids = torch.topk(logits, 1, dim=1)
    weighted = x * torch.sigmoid(score.float()).to(x.dtype)
    return module.shared_expert(x) + experts(weighted, expert_ids, torch.ones_like(score)), logits


def _llama4_expert(module: Any, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ tensors["gate_up_proj"]).chunk(2, dim=-1)
    return (up * module.experts.act_fn(gate)) @ tensors["down_proj"]


FORMS: dict[str, ExpertsForm] = {
    "transformers.models.llama4.modeling_llama4.Llama4TextMoe": ExpertsForm(
        weights={"gate_up_proj": "experts.gate_up_proj", "down_proj": "experts.down_proj"},
        compute=_llama4_expert,
        forward=_llama4_forward,
    ),
}
