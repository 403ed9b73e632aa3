"""Attention that transformers' exporter leaves unfused, in a form that keeps its caches in place.

Attention sinks: a logit of each head (or of each query) that takes part in the softmax and attends to nothing. Such
attention becomes one `pocketmoe::Attention` node, which `cut.attention` turns into ONNX Runtime's GroupQueryAttention.

Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) caches one latent vector a token, which
transformers expands to the keys and values of every head, of every token in the cache, at every step. The expansion is
linear, so it is moved to the other side of both products (their "absorbed" form): queries are taken to the latents'
space, attend to the latents themselves, and what comes out is taken to the heads' values. A step then reads the cache
once, and computes nothing for each token in it but two products.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Generator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch

from pocketmoe.export.capture.monkeypatches import replaced

DOMAIN = "pocketmoe"
OP_TYPE = "Attention"
_EAGER = "eager_attention_forward"
_IMPLEMENTATION = "sdpa"
_KEYS, _VALUES = "latent_keys", "latent_values"
# Models whose eager attention is softmax over scores, mask, and the logits of sinks: of `module.sinks` or as `sinks`.
_WITH_SINKS = {"flint", "gpt_oss", "granitemoe_swa", "hy_v4", "inkling2", "mimo_v2_flash"}

_Interface = Callable[..., tuple[torch.Tensor, Any]]


@cache
def install() -> None:
    """Register the operator with torch, ONNX and transformers; a second call does nothing."""
    import onnx
    from onnxscript.values import Opset
    from transformers.exporters import exporter_onnx

    @torch.library.custom_op(f"{DOMAIN}::attention", mutates_args=())
    def attention(  # never computes anything of use: it is there to be captured
        query: torch.Tensor,
        key: torch.Tensor,  # noqa: ARG001
        value: torch.Tensor,
        bias: torch.Tensor,  # noqa: ARG001
        sinks: torch.Tensor | None,  # noqa: ARG001
        scale: float,  # noqa: ARG001
    ) -> torch.Tensor:
        return query.new_zeros(*query.shape[:-1], value.shape[-1])

    @attention.register_fake
    def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:  # noqa: ARG001
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    schema = onnx.defs.OpSchema
    optional = schema.FormalParameter("sinks", "T", param_option=schema.FormalParameterOption.Optional)
    onnx.defs.register_schema(
        schema(
            OP_TYPE,
            DOMAIN,
            1,
            "softmax(scale * query key^T + bias, with each head's sink) value; heads of keys serve several of queries.",
            inputs=[*(schema.FormalParameter(name, "T") for name in ("query", "key", "value", "bias")), optional],
            outputs=[schema.FormalParameter("y", "T")],
            type_constraints=[("T", ["tensor(float)"], "")],
            attributes=[schema.Attribute("scale", schema.AttrType.FLOAT, "Of the scores.", required=True)],
        )
    )
    opset: Any = Opset(DOMAIN, 1)

    def translate(query: Any, key: Any, value: Any, bias: Any, sinks: Any, scale: float) -> Any:
        return opset.Attention(query, key, value, bias, sinks, scale=scale)

    exporter_onnx._ONNX_TRANSLATION_TABLE[torch.ops.pocketmoe.attention.default] = translate  # pyright: ignore[reportPrivateUsage]


def sink_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    position_bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What the eager functions of `_WITH_SINKS` compute: y [1, S, H, V], as one node.

    query [1, H, S, K], key [1, heads, T, K], value [1, heads, T, V], attention_mask [1, 1, S, T], position_bias and
    sinks, of each query, [1, H, S, T] and [1, H, S, 1]; the module's own sinks are [H].
    """
    bias = attention_mask if position_bias is None else attention_mask + position_bias
    logits = getattr(module, "sinks", None)
    if sinks is not None:  # a sink of s beside scores x is a sink of 0 beside x - s
        bias, logits = bias - sinks, query.new_zeros(query.shape[1])
    y = torch.ops.pocketmoe.attention(query, key, value, bias, logits, scaling)
    return y.transpose(1, 2), None


def latent_attention(
    module: Any,
    query: torch.Tensor,
    latent: torch.Tensor,
    rotary: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention to latents: y [1, S, H, V].

    query [1, H, S, N + R], latent [1, 1, T, L], rotary [1, 1, T, R], attention_mask [1, 1, S, T].
    """
    keys: torch.Tensor = getattr(module, _KEYS)  # [H, N, L]
    values: torch.Tensor = getattr(module, _VALUES)  # [H, L, V]
    heads, width = keys.shape[:2]
    query = query * scaling
    inner, turned = query[..., :width] @ keys, query[..., width:]
    # All heads see the same latents: as rows of one product they are read once, not once for each head.
    scores = inner.flatten(1, 2) @ latent.squeeze(1).mT + turned.flatten(1, 2) @ rotary.squeeze(1).mT
    scores = scores.reshape(1, heads, -1, latent.shape[2])
    scores = scores + _added(attention_mask, scores)
    sinks = getattr(module, "sinks", None)
    if sinks is not None:
        scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : latent.shape[2]]
    found = weights.flatten(1, 2) @ latent.squeeze(1)
    return (found.reshape(1, heads, -1, latent.shape[3]) @ values).transpose(1, 2), None


def _added(mask: torch.Tensor | None, scores: torch.Tensor) -> torch.Tensor:
    """What a mask of transformers' adds to scores [1, H, S, T]; without one, each token sees all before it."""
    if mask is None:
        tokens, total = scores.shape[2:]
        mask = scores.new_ones(tokens, total, dtype=torch.bool).tril(total - tokens)
    if mask.dtype != torch.bool:
        return mask
    return scores.new_zeros(()).masked_fill(~mask, torch.finfo(scores.dtype).min)


@contextmanager
def attention_in_place(model: torch.nn.Module) -> Generator[None]:
    """Inside, `model` computes its attention by `sink_attention` and `latent_attention` where those do the same."""
    install()
    with ExitStack() as stack:
        latents = {module for module in model.modules() if _absorbs(module, stack)}
        for namespace in {type(module).__module__ for module in model.modules()}:
            source = sys.modules[namespace]
            own = getattr(source, _EAGER, None)
            if own is not None:
                other = sink_attention if namespace.rpartition("modeling_")[2] in _WITH_SINKS else own
                stack.enter_context(replaced(source, _EAGER, _Dispatch(latents, other)))
        if latents:
            stack.enter_context(_latent_interface(latents))
        yield


class _Dispatch:
    """An attention function of transformers: latent attention for the modules `latents`, `other` for the rest."""

    def __init__(self, latents: Collection[torch.nn.Module], other: _Interface) -> None:
        self._latents, self._other = latents, other

    def __call__(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        return (latent_attention if module in self._latents else self._other)(module, *args, **kwargs)


@contextmanager
def _latent_interface(latents: Collection[torch.nn.Module]) -> Generator[None]:
    """Inside, transformers' table of attention functions has latent attention for these modules."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    table: Any = ALL_ATTENTION_FUNCTIONS
    before = table[_IMPLEMENTATION]
    table[_IMPLEMENTATION] = _Dispatch(latents, before)
    try:
        yield
    finally:
        table[_IMPLEMENTATION] = before


def _absorbs(module: Any, stack: ExitStack) -> bool:
    """Whether a module expands latents as multi-head latent attention does; `stack` then has it not do so."""
    expand = getattr(module, "expand_kv", None)
    weight = getattr(getattr(module, "kv_b_proj", None), "weight", None)
    if expand is None or weight is None:
        return False
    rank = weight.shape[1]
    latent, rotary = torch.randn(1, 1, 3, rank), torch.randn(1, 1, 3, module.qk_rope_head_dim)
    with torch.no_grad():
        found_keys, found_values = expand(latent, rotary)
    heads, width = found_keys.shape[1], found_keys.shape[3] - rotary.shape[3]
    by_head = weight.detach().view(heads, -1, rank)  # views: a checkpoint's weights are mapped from a file
    keys, values = by_head[:, :width], by_head[:, width:].mT
    expected = torch.cat([latent @ keys.mT, rotary.expand(1, heads, -1, -1)], dim=-1), latent @ values
    if not all(map(_close, (found_keys, found_values), expected)):
        return False
    for name, parameter in ((_KEYS, keys), (_VALUES, values)):
        module.register_parameter(name, torch.nn.Parameter(parameter, requires_grad=False))
        stack.callback(delattr, module, name)
    stack.enter_context(replaced(module, "expand_kv", _as_they_are))
    return True


def _as_they_are(latent: torch.Tensor, rotary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return latent, rotary


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
