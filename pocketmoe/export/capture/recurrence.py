"""Linear attention and state space layers, token by token: one ONNX Scan instead of an unrolled chunked algorithm.

transformers computes such a layer for many tokens at once by an algorithm over chunks whose loops run at trace time:
its export takes many minutes and fixes the length of the text. The recurrences that they are derived from need no
chunks. They replace transformers' functions during the capture (`monkeypatches`), whichever model calls them.

Shapes: B batch, S tokens, H heads, K and V the widths of keys and values, N state width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

Step = Callable[[torch.Tensor, Sequence[torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]


def _scan(step: Step, state: torch.Tensor, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `step` over axis 1 of the inputs [B, S, ...]; the outputs [B, S, ...] and the last state."""
    from torch._higher_order_ops.scan import scan

    by_token = [x.transpose(0, 1).contiguous() for x in inputs]
    last, outputs = scan(step, state.contiguous(), by_token, dim=0)
    return outputs.transpose(0, 1), last


def _delta_step(state: torch.Tensor, xs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated delta rule for one token: state [B, H, K, V] forgets by `decay` [B, H, K or 1], corrects what it has
    stored at key k towards v by the rate beta, and is read at q.

    Yang et al., Gated Delta Networks (arXiv:2412.06464), equation 10; Kimi Linear (arXiv:2510.26692) decays by key.
    """
    q, k, v, decay, beta = xs
    stored, read = (torch.stack([k, q], dim=-2) * decay.unsqueeze(-2) @ state).unbind(dim=-2)
    correction = (v - stored) * beta.unsqueeze(-1)
    output = read + (q * k).sum(dim=-1, keepdim=True) * correction
    return state * decay.unsqueeze(-1) + k.unsqueeze(-1) * correction.unsqueeze(-2), output


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
    read = (state @ out_of.unsqueeze(-1)).squeeze(-1) * decay
    output = read + x * (into * out_of).sum(dim=-1, keepdim=True)
    return state * decay.unsqueeze(-1) + x.unsqueeze(-1) * into.unsqueeze(-2), output


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


class SelectiveScan:
    """Mamba-1's scan over many tokens, which starts from its layer's state: transformers' own ignores that.

    The state does not come with the arguments, so `remember` is to be a forward pre-hook of every layer that scans.
    """

    def __init__(self) -> None:
        self._start: torch.Tensor | None = None  # [B, V, N], of the layer whose forward is running

    def remember(self, module: Any, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the state that a layer is about to start from."""
        cache = kwargs.get("cache_params")
        self._start = None if cache is None else cache.get_recurrent_state(module.layer_idx, state_idx=0)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,  # noqa: N803
        B: torch.Tensor,  # noqa: N803
        C: torch.Tensor,  # noqa: N803
        D: torch.Tensor | None = None,  # noqa: N803
        z: torch.Tensor | None = None,
        delta_bias: torch.Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **_: Any,
    ) -> Any:
        """Mamba (arXiv:2312.00752, section 3): hidden_states, dt and z [B, V, S], A [V, N], B and C [B, N, S], D [V].

        Returns [B, V, S] and, if asked for, the state [B, V, N].
        """
        if delta_bias is not None:
            dt = dt + delta_bias.to(dt.dtype)[..., None]
        if delta_softplus:
            dt = F.softplus(dt)
        x, dt, into, out_of = (t.transpose(1, 2).float() for t in (hidden_states, dt, B, C))  # [B, S, ...]
        state = self._start
        if state is None:
            state = x.new_zeros(x.shape[0], A.shape[0], A.shape[1])
        # one head whose every channel decays by itself
        outputs, last = _scan(_channel_step, state.float(), (x * dt, torch.exp(dt.unsqueeze(-1) * A), into, out_of))
        outputs = outputs.transpose(1, 2)
        if D is not None:
            outputs = outputs + hidden_states * D[None, :, None]
        if z is not None:
            outputs = outputs * F.silu(z)
        return (outputs, last) if return_last_state else outputs


def _channel_step(state: torch.Tensor, xs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for one token without heads: state and decay [B, V, N]."""
    x, decay, into, out_of = xs
    state = state * decay + x.unsqueeze(-1) * into.unsqueeze(-2)
    return state, (state * out_of.unsqueeze(-2)).sum(dim=-1)


def _lightning_step(state: torch.Tensor, xs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Lightning attention for one token: state [B, H, K, V] decays by a fixed rate of its head."""
    q, k, v, decay = xs
    read = (q.unsqueeze(-2) @ state).squeeze(-2) * decay.squeeze(-1)
    output = read + (q * k).sum(dim=-1, keepdim=True) * v
    return state * decay + k.unsqueeze(-1) * v.unsqueeze(-2), output


def lightning_attention(
    module: Any,
    hidden_states: torch.Tensor,
    position_embeddings: Any = None,  # noqa: ARG001
    attention_mask: torch.Tensor | None = None,  # noqa: ARG001 ; a text has no padding here
    past_key_values: Any = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """MiniMax's layer (arXiv:2501.08313, section 2.2) with its decay applied from one token to the next.

    hidden_states [B, S, width]; returns the same shape and the state [B, H, K, V].
    """
    batch, tokens, _width = hidden_states.shape
    heads, width = module.num_attention_heads, module.head_dim
    qkv = module.act_fn(module.qkv_proj(hidden_states)).reshape(batch, tokens, heads, 3 * width)
    decay = torch.exp(-module.slope_rate).expand(batch, tokens, heads, 1, 1)
    state = None if past_key_values is None else past_key_values.get_linear_cache(module.layer_idx)
    if state is None:
        state = hidden_states.new_zeros(batch, heads, width, width)
    outputs, state = _scan(_lightning_step, state, (*qkv.split(width, dim=3), decay))
    outputs = module.norm(outputs.reshape(batch, tokens, heads * width))
    outputs = module.out_proj(torch.sigmoid(module.output_gate(hidden_states)) * outputs)
    if past_key_values is not None:
        past_key_values.set_linear_cache(module.layer_idx, state)
    return outputs, state


# transformers' name of a chunked (or unrolled) function -> the recurrence that computes the same
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch_chunk_gated_delta_rule": gated_delta_rule,
    "chunk_kimi_delta_attention": gated_delta_rule,
    "mamba2_chunk_scan": selective_state_space,
}
SELECTIVE_SCAN = "mamba_selective_scan"  # transformers' name of what a `SelectiveScan` replaces
# a class with such a loop in a method -> the method
METHODS: dict[str, dict[str, Callable[..., Any]]] = {"MiniMaxLightningAttention": {"forward": lightning_attention}}
