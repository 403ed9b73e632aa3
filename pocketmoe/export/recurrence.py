"""Linear attention and state space layers, token by token: one ONNX Scan instead of an unrolled chunked algorithm.

transformers computes such a layer for many tokens at once by an algorithm over chunks whose loops run at trace time:
its export takes many minutes and fixes the length of the text. The recurrences that they are derived from need no
chunks. Inside `step_by_step` the functions named in `FORMS` are the recurrence, whichever model calls them.

Shapes: B batch, S tokens, H heads, K and V the widths of keys and values, N state width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

Step = Callable[[torch.Tensor, Sequence[torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]


@contextmanager
def step_by_step(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the modules that `model` is written in use the recurrent forms."""
    replaced: list[tuple[Any, str, Any]] = []
    for source in {type(module).__module__ for module in model.modules()}:
        namespace = sys.modules[source]
        for name, value in list(vars(namespace).items()):
            form = FORMS.get(getattr(value, "__name__", "")) if callable(value) else None
            if form is not None:
                replaced.append((namespace, name, value))
                setattr(namespace, name, form)
    try:
        yield
    finally:
        for namespace, name, value in replaced:
            setattr(namespace, name, value)


def _scan(step: Step, state: torch.Tensor, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `step` over axis 1 of the inputs [B, S, ...]; the outputs [B, S, ...] and the last state."""
    from torch._higher_order_ops.scan import scan

    by_token = [x.transpose(0, 1).contiguous() for x in inputs]
    last, outputs = scan(step, state, by_token, dim=0)
    return outputs.transpose(0, 1), last


def _delta_step(state: torch.Tensor, xs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated delta rule for one token: state [B, H, K, V] forgets by `decay` [B, H, K or 1], corrects what it has
    stored at key k towards v by the rate beta, and is read at q.

    Yang et al., Gated Delta Networks (arXiv:2412.06464), equation 10; Kimi Linear (arXiv:2510.26692) decays by key.
    """
    q, k, v, decay, beta = xs
    state = state * decay.unsqueeze(-1)
    stored = (state * k.unsqueeze(-1)).sum(dim=-2)
    correction = (v - stored) * beta.unsqueeze(-1)
    state = state + k.unsqueeze(-1) * correction.unsqueeze(-2)
    return state, (state * q.unsqueeze(-1)).sum(dim=-2)


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """query, key [B, S, Hk, K], value [B, S, H, V], g [B, S, H] or [B, S, H, K] (log of the decay), beta [B, S, H].

    Returns [B, S, H, V] and the state [B, H, K, V].
    """
    dtype, heads, width = query.dtype, value.shape[2], key.shape[-1]
    query, key, value, g, beta = (x.to(torch.float32) for x in (query, key, value, g, beta))
    if key.shape[2] != heads:  # each key head serves several value heads
        query, key = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (query, key))
    if use_qk_l2norm_in_kernel:
        query, key = (x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6) for x in (query, key))
    decay = g.exp() if g.ndim == key.ndim else g.exp().unsqueeze(-1)
    if initial_state is None:
        initial_state = value.new_zeros(value.shape[0], heads, width, value.shape[-1])
    inputs = (query * width**-0.5, key, value, decay, beta)
    outputs, state = _scan(_delta_step, initial_state.to(torch.float32), inputs)
    return outputs.to(dtype), state if output_final_state else None


def _ssm_step(state: torch.Tensor, xs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """A selective state space for one token: state [B, H, V, N] decays, takes up x along B and is read along C."""
    x, decay, into, out_of = xs
    state = state * decay.unsqueeze(-1) + x.unsqueeze(-1) * into.unsqueeze(-2)
    return state, (state * out_of.unsqueeze(-2)).sum(dim=-1)


def selective_state_space(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,  # noqa: N803
    B: torch.Tensor,  # noqa: N803
    C: torch.Tensor,  # noqa: N803
    D: torch.Tensor | None = None,  # noqa: N803
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_: Any,
) -> Any:
    """Mamba-2 (arXiv:2405.21060, section 3), for hidden_states [B, S, H, V].

    dt [B, S, H], A and D [H], B and C [B, S, G, N]. Returns [B, S, H, V] and, if asked for, the state [B, H, V, N].
    """
    heads, width = hidden_states.shape[2:]
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1]).float()
    x = hidden_states.float()
    into, out_of = (t.float().repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))
    decay = torch.exp(A.float() * dt).unsqueeze(-1)
    if initial_states is None:
        initial_states = x.new_zeros(x.shape[0], heads, width, B.shape[-1])
    outputs, state = _scan(_ssm_step, initial_states.float(), (x * dt.unsqueeze(-1), decay, into, out_of))
    if D is not None:
        outputs = outputs + D.unsqueeze(-1) * x
    return (outputs, state) if return_final_states else outputs


# transformers' name of a chunked (or unrolled) function -> the recurrence that computes the same
FORMS: dict[str, Callable[..., Any]] = {
    "torch_chunk_gated_delta_rule": gated_delta_rule,
    "chunk_kimi_delta_attention": gated_delta_rule,
    "mamba2_chunk_scan": selective_state_space,
}
