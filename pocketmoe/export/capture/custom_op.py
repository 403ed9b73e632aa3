"""The custom operator: every routed-experts module of a transformers model becomes one `pocketmoe::Experts` node.

transformers lets the experts of a model be computed by a registered function (`ALL_EXPERTS_FUNCTIONS`). Ours is an
operator without a body: it only marks, in the captured graph, where routed experts go and what goes into them. Modules
with a registered form (`expert_form.register`, `registered`) call the same operator.
`install` teaches the operator to torch, ONNX and transformers; nothing is registered by importing this module.
"""

# pyright: reportPrivateUsage=false
# (transformers' table of translations to ONNX, and the dict in which a torch module keeps its own parameters)

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from pocketmoe.export.capture.adapters import MoeModule, form_of

DOMAIN = "pocketmoe"
OP_TYPE = "Experts"
IMPLEMENTATION = "pocketmoe"  # the key in transformers' table of experts implementations
LAYER = "_pocketmoe_layer"


@cache
def install() -> None:
    """Register the operator with torch, ONNX and transformers; a second call does nothing."""
    import onnx
    from onnxscript.values import Opset
    from transformers.exporters import exporter_onnx
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from pocketmoe.export.capture import exporter_patches

    exporter_patches.install()

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
    opset: Any = Opset(DOMAIN, 1)

    def translate(x: Any, expert_ids: Any, expert_weights: Any, layer: int) -> Any:
        return opset.Experts(x, expert_ids, expert_weights, layer=layer)

    def forward(
        module: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return _operator(getattr(module, LAYER), hidden_states, top_k_index, top_k_weights)

    exporter_onnx._ONNX_TRANSLATION_TABLE[torch.ops.pocketmoe.experts.default] = translate
    ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] = forward


def find_experts(model: Any) -> dict[str, MoeModule]:
    """The model's modules with routed experts by name, in forward order. Raises UnsupportedModel for odd ones."""
    hidden = model.config.get_text_config().hidden_size
    found = ((name, module) for name, module in model.named_modules() if form_of(module) is not None)
    return {name: MoeModule.of(name, module, hidden) for name, module in found}


@contextmanager
def experts_as_operator(model: Any, experts: dict[str, MoeModule]) -> Generator[None]:
    """Inside, each experts module of `model` is a call of the operator, with its place in `experts` as `layer`, and its
    parameters are taken out of the model.
    """
    install()
    kept = _take_parameters(model, experts.values())
    dispatched = any(moe.form.forward is None for moe in experts.values())
    before = model.get_experts_implementation() if dispatched else None
    for layer, moe in enumerate(experts.values()):
        setattr(moe.module, LAYER, layer)
        if moe.form.forward is not None:
            moe.module.forward = _forward(moe, layer)
    if dispatched:
        model.set_experts_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        if dispatched:
            model.set_experts_implementation(before)
        for moe in experts.values():
            delattr(moe.module, LAYER)
            moe.module.__dict__.pop("forward", None)
        for owner, parameters in kept:
            owner._parameters = parameters


def _forward(moe: MoeModule, layer: int) -> Callable[..., Any]:
    """The forward of a module with a registered form, whose experts are the operator."""
    form_forward = moe.form.forward
    assert form_forward is not None

    def forward(*args: Any, **kwargs: Any) -> Any:
        return form_forward(moe.module, functools.partial(_operator, layer), *args, **kwargs)

    return forward


def _operator(layer: int, x: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor) -> torch.Tensor:
    return torch.ops.pocketmoe.experts(x, expert_ids.to(torch.int64), expert_weights.to(x.dtype), layer)


def _take_parameters(model: torch.nn.Module, experts: Iterable[MoeModule]) -> list[tuple[Any, dict[str, Any]]]:
    """Remove the experts' parameters, which capture must not touch; returns what to give back to whom."""
    kept: dict[torch.nn.Module, dict[str, Any]] = {}
    for path in (path for moe in experts for path in moe.parameters()):
        owner = model.get_submodule(path.rpartition(".")[0])
        if owner not in kept:
            kept[owner] = owner._parameters
            owner._parameters = dict(owner._parameters)
        del owner._parameters[path.rpartition(".")[2]]
    return list(kept.items())
