"""The recurrences compute what transformers' chunked algorithms compute, whole or in pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.models.granitemoehybrid import modeling_granitemoehybrid as granite
from transformers.models.jamba import modeling_jamba as jamba
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.minimax import modeling_minimax as minimax
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from pocketmoe.export.capture import recurrence
from pocketmoe.export.capture.monkeypatches import monkeypatched
from tests.export.architectures import tiny_config

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' fallbacks

TOKENS, CUT, HEADS, KEY, VALUE = 37, 21, 4, 16, 8
Call = Callable[[slice, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def delta_rule(function: Any, decay: tuple[int, ...], key_heads: int) -> Call:
    """The gated delta rule on the tokens of a slice, from a state; `decay` is what follows the heads in its shape."""
    q, k = (random(1, TOKENS, key_heads, KEY, seed=seed) for seed in (1, 2))
    v, g = random(1, TOKENS, HEADS, VALUE), -random(1, TOKENS, HEADS, *decay, seed=4).abs()
    beta = random(1, TOKENS, HEADS, seed=5).sigmoid()

    def call(part: slice, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [x[:, part] for x in (q, k, v)]
        options = {"g": g[:, part], "beta": beta[:, part], "initial_state": state}
        return function(*parts, **options, output_final_state=True, use_qk_l2norm_in_kernel=True)

    return call


def mamba2(function: Any) -> Call:
    x, dt = random(1, TOKENS, HEADS, VALUE), random(1, TOKENS, HEADS, seed=1)
    b, c = (random(1, TOKENS, 2, KEY, seed=seed) for seed in (2, 3))
    rates, skip, bias = -random(HEADS, seed=4).exp(), random(HEADS, seed=5), random(HEADS, seed=6)

    def call(part: slice, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        parts = (x[:, part], dt[:, part], rates, b[:, part], c[:, part])
        options = {"D": skip, "dt_bias": bias, "dt_softplus": True, "dt_limit": (0.01, 2.0)}
        return function(*parts, chunk_size=16, initial_states=state, return_final_states=True, **options)

    return call


PAIRS = {
    "gated delta rule": (
        delta_rule(recurrence.gated_delta_rule, (), 2),
        delta_rule(qwen.torch_chunk_gated_delta_rule, (), 2),
    ),
    "decay by key": (
        delta_rule(recurrence.gated_delta_rule, (KEY,), HEADS),
        delta_rule(kimi.chunk_kimi_delta_attention, (KEY,), HEADS),
    ),
    "mamba-2": (mamba2(recurrence.selective_state_space), mamba2(granite.mamba2_chunk_scan)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_same_as_in_chunks(name: str) -> None:
    ours, theirs = PAIRS[name]
    _, state = theirs(slice(0, CUT), None)
    for start in (None, state):
        for found, expected in zip(ours(slice(CUT, None), start), theirs(slice(CUT, None), start), strict=True):
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_mamba_1_goes_on_from_its_state() -> None:
    """transformers' own function over many tokens starts from nothing, so it is the truth for a whole text only."""
    width = 12
    x, dt, z = (random(1, width, TOKENS, seed=seed) for seed in (1, 2, 3))
    b, c = (random(1, KEY, TOKENS, seed=seed) for seed in (4, 5))
    rates, skip, bias = -random(width, KEY, seed=6).exp(), random(width, seed=7), random(width, seed=8)

    def call(function: Any, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [t[..., part] for t in (x, dt)] + [rates] + [t[..., part] for t in (b, c)]
        options = {"D": skip, "z": z[..., part], "delta_bias": bias, "delta_softplus": True}
        return function(*parts, **options, return_last_state=True)

    class Cache:
        state: torch.Tensor | None = None

        def get_recurrent_state(self, layer: int, state_idx: int) -> torch.Tensor | None:
            return self.state

    class Layer:
        layer_idx = 0

    cache, scan, outputs = Cache(), recurrence.SelectiveScan(), []
    for part in (slice(0, CUT), slice(CUT, None)):
        scan.remember(Layer(), (), {"cache_params": cache})
        output, cache.state = call(scan, part)
        outputs.append(output)
    expected, state = call(jamba.mamba_selective_scan, slice(None))
    torch.testing.assert_close(torch.cat(outputs, dim=-1), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(cache.state, state, atol=1e-5, rtol=1e-4)


def test_lightning_attention() -> None:
    module = minimax.MiniMaxLightningAttention(tiny_config("minimax"), layer_idx=1).eval()
    x = random(1, TOKENS, module.qkv_proj.in_features)
    with torch.no_grad():
        expected, state = module(x, None, None)
        with monkeypatched(module):
            found, last = module(x, None, None)
        again, _ = module(x, None, None)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(last, state, atol=1e-5, rtol=1e-4)
    assert torch.equal(again, expected), "the module is as before"
