"""The seam: every routed-experts module of a transformers model becomes one `pocketmoe::Experts` node.

transformers lets the experts of a model be computed by a registered function (`ALL_EXPERTS_FUNCTIONS`). Ours is an
operator without a body: it only marks, in the captured graph, where routed experts go and what goes into them.
`install` teaches the operator to torch, ONNX and transformers; nothing is registered by importing this module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

DOMAIN = "pocketmoe"
OP_TYPE = "Experts"
IMPLEMENTATION = "pocketmoe"  # the key in transformers' table of experts implementations
LAYER = "_pocketmoe_layer"

_FLAGS = ("is_concatenated", "is_transposed", "has_bias", "has_gate")


@cache
def install() -> None:
    """Register the operator with torch, ONNX and transformers; a second call does nothing."""
    import onnx
    from onnxscript.values import Opset
    from transformers.exporters import exporter_onnx
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    @torch.library.custom_op(f"{DOMAIN}::experts", mutates_args=())
    def experts(  # never computes anything of use: it is there to be captured
        x: torch.Tensor,
        expert_ids: torch.Tensor,  # noqa: ARG001
        expert_weights: torch.Tensor,  # noqa: ARG001
        layer: int,  # noqa: ARG001
    ) -> torch.Tensor:
        return torch.zeros_like(x)

    @experts.register_fake
    def _(x: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.empty_like(x)

    schema = onnx.defs.OpSchema
    onnx.defs.register_schema(
        schema(
            OP_TYPE,
            DOMAIN,
            1,
            "The weighted sum of the routed experts of one MoE layer.",
            inputs=[
                schema.FormalParameter("x", "T"),
                schema.FormalParameter("expert_ids", "tensor(int64)"),
                schema.FormalParameter("expert_weights", "T"),
            ],
            outputs=[schema.FormalParameter("y", "T")],
            type_constraints=[("T", ["tensor(float)"], "")],
            attributes=[schema.Attribute("layer", schema.AttrType.INT, "The MoE layer.", required=True)],
        )
    )
    opset = Opset(DOMAIN, 1)

    def translate(x: Any, expert_ids: Any, expert_weights: Any, layer: int) -> Any:
        return opset.Experts(x, expert_ids, expert_weights, layer=layer)

    def forward(
        module: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        ids = top_k_index.to(torch.int64)
        weights = top_k_weights.to(hidden_states.dtype)
        return torch.ops.pocketmoe.experts(hidden_states, ids, weights, getattr(module, LAYER))

    exporter_onnx._ONNX_TRANSLATION_TABLE[torch.ops.pocketmoe.experts.default] = translate
    ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] = forward


def find_experts(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The model's routed-experts modules by name, in forward order: those whose class went through the seam.

    transformers' decorator leaves a wrapped forward and the layout flags on the module.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if all(hasattr(module, flag) for flag in _FLAGS) and hasattr(type(module).forward, "__wrapped__")
    }


@contextmanager
def seam(model: Any, experts: dict[str, torch.nn.Module]) -> Iterator[None]:
    """Inside, the model's experts are the operator, numbered in the order of `experts`, and hold no weights."""
    install()
    kept = {name: module._parameters for name, module in experts.items()}
    before = model.get_experts_implementation()
    for layer, module in enumerate(experts.values()):
        setattr(module, LAYER, layer)
        module._parameters = {}  # capture must not touch weights that are not in memory
    model.set_experts_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_experts_implementation(before)
        for name, module in experts.items():
            module._parameters = kept[name]
            delattr(module, LAYER)
