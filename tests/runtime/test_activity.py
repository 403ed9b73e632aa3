"""What a model has done so far can be looked at while it answers, and adds up."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from pocketmoe.errors import BadInput
from pocketmoe.runtime.engine.statistics import Activity
from pocketmoe.runtime.model import LoadRequest, Model
from tests import runnable
from tests.hang import HANG_S


def looked_at(model: Model) -> Activity:
    """From another thread."""
    found: list[Activity] = []
    thread = threading.Thread(target=lambda: found.append(model.activity()))
    thread.start()
    thread.join(HANG_S)
    return found[0]


def test_it_adds_up_while_an_answer_is_streaming(tmp_path: Path) -> None:
    """Uses are the tokens' choices, experts that were wanted are hits or misses, and those read are in memory."""
    runnable.write_bundle(tmp_path / "B")
    with Model(tmp_path / "B", LoadRequest()) as model:
        layers = model.bundle.manifest.moe_layers
        before = model.activity()
        assert before.hits + before.prefetch_hits + before.misses == before.decoded_tokens == 0
        with model.stream([1, 2, 3, 4, 5], max_tokens=6, min_tokens=6) as stream:
            next(stream)
            middle = looked_at(model)
            rest = [*stream]
            result = stream.result
        after = model.activity()
        assert rest
        assert 0 <= middle.decoded_tokens < after.decoded_tokens == len(result.tokens) - 1
        fed = result.prompt_tokens + after.decoded_tokens
        for layer, uses, residents in zip(layers, after.expert_counts, after.residents, strict=True):
            assert uses.shape == residents.shape == (layer.n_experts,)
            assert uses.sum() == fed * layer.top_k
            assert residents[uses > 0].any()
        assert (after.expert_counts[0] >= middle.expert_counts[0]).all()
        assert after.hits + after.prefetch_hits + after.misses >= sum((uses > 0).sum() for uses in after.expert_counts)
        assert after.decoding_s > 0
        assert 0 <= after.waiting_s <= after.decoding_s
        assert 0 < after.used_bytes <= after.peak_bytes <= after.budget_bytes
        assert "expert slots" in after.claims
    with pytest.raises(BadInput, match="closed"):
        model.activity()
