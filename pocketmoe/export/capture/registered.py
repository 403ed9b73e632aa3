"""Forms of MoE modules of transformers that do not go through its experts interface.

They are written the way a user's own would be (`expert_form.register`), but by the name of their class: nothing is
imported for models that are not asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from pocketmoe.errors import UnsupportedModel
from pocketmoe.export.capture.expert_form import ExpertsForm, RunExperts, Tensors


def _llama4_forward(module: Any, experts: RunExperts, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Llama 4 scales an expert's input by its score: with one expert per token, x is scaled, and weights are ones."""
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


def _jetmoe_route(module: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits, expert_ids = module.router.layer(x).float().topk(module.router.top_k, dim=1)
    return expert_ids, torch.softmax(logits, dim=1).to(x.dtype)


def _jetmoe_forward(module: Any, experts: RunExperts, hidden_states: torch.Tensor) -> torch.Tensor:
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    return experts(x, *_jetmoe_route(module, x)).reshape(hidden_states.shape) + module.bias


def _jetmoe_expert(module: Any, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(x, tensors["input_linear"]).chunk(2, dim=-1)
    return F.linear(module.activation(gate) * up, tensors["output_linear"])


def _jetmoe_queries(module: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None, tuple[torch.Tensor, ...]]:
    """JetMoE's attention has experts too, for its queries and its output: these stay dense, all of them in one product.

    Returns the chosen experts' queries [batch, tokens, k, width] and what `_jetmoe_outputs` needs to know.
    """
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    expert_ids, gates = _jetmoe_route(module, x)
    n_experts, width = module.input_linear.weight.shape[:2]
    queries = F.linear(x, module.input_linear.weight.flatten(0, 1)).reshape(-1, n_experts, width)
    chosen = queries.gather(1, expert_ids.unsqueeze(-1).expand(-1, -1, width))
    return chosen.reshape(*hidden_states.shape[:2], -1, width), None, (expert_ids, gates)


def _jetmoe_outputs(module: Any, attended: torch.Tensor, chosen: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The chosen experts' outputs for `attended` [batch, tokens, k, width], weighted and summed."""
    expert_ids, gates = chosen
    n_experts, outputs, width = module.output_linear.weight.shape
    rows = attended.reshape(-1, attended.shape[2], width) * gates.unsqueeze(-1)
    by_expert = rows.new_zeros(rows.shape[0], n_experts, width)
    by_expert = by_expert.scatter(1, expert_ids.unsqueeze(-1).expand(-1, -1, width), rows)
    y = F.linear(by_expert.flatten(1), module.output_linear.weight.transpose(0, 1).reshape(outputs, -1))
    return y.reshape(*attended.shape[:2], outputs) + module.bias


def _phimoe_rotary(module: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Phi's rotary tables, scaled by how long the text is: chosen in the graph, not when it is captured."""
    inv_freq, scale = module.rope_init_fn(module.config)
    rope = module.config.rope_parameters
    if rope["rope_type"] != "default":
        long = position_ids.max() >= rope["original_max_position_embeddings"]
        scale = torch.where(long, torch.tensor(rope["long_mscale"]), torch.tensor(rope["short_mscale"]))
    angles = position_ids[..., None].float() * inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)


FORMS: dict[str, ExpertsForm] = {
    "transformers.models.llama4.modeling_llama4.Llama4TextMoe": ExpertsForm(
        weights={"gate_up_proj": "experts.gate_up_proj", "down_proj": "experts.down_proj"},
        compute=_llama4_expert,
        forward=_llama4_forward,
    ),
    "transformers.models.jetmoe.modeling_jetmoe.JetMoeMoE": ExpertsForm(
        weights={"input_linear": "input_linear.weight", "output_linear": "output_linear.weight"},
        compute=_jetmoe_expert,
        forward=_jetmoe_forward,
    ),
}
# classes whose methods have a form that can be captured
METHODS: dict[str, dict[str, Callable[..., Any]]] = {
    "JetMoeMoA": {"map": _jetmoe_queries, "reduce": _jetmoe_outputs},
    "PhimoeRotaryEmbedding": {"forward": _phimoe_rotary},
}
