"""Configurations, assumptions and prices that are absurd: an answer or one line, never a traceback or a gigabyte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pocketmoe.errors import PocketMoEError
from pocketmoe.profiles.planning import PlanRequest, make_plan, read_model
from pocketmoe.profiles.shapes import read_config

CONFIG = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}
MORE = [
    "moe_layer_interval",
    "moe_layer_end_index",
    "mlp_only_layers",
    "moe_layer_freq",
    "first_k_dense_replace",
    "decoder_sparse_step",
    "layer_types",
    "kv_lora_rank",
    "head_dim",
    "text_config",
    "num_shared_experts",
]
NUMBERS = [-1, 0, 1, 3, 2**31 - 1, 10**7, 10**9, 2**53, 10**30, 1.5, 1e308]
ABSURD = st.sampled_from([*NUMBERS, True, "x", "", None, [], {}, [[]], [-1], [[1]], {"a": 1}])


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from([*CONFIG, *MORE]), ABSURD, min_size=1, max_size=3))
def test_an_absurd_configuration_is_planned_or_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Whatever is in a field, the model is counted or refused in a line that names the file."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**CONFIG, **changes}))
    try:
        shape, footprints = read_model(path)
    except PocketMoEError as error:
        refused = error
    else:
        assert shape.parameters > 0
        assert all(footprint.expert_bytes > 0 for footprint in footprints)
        return
    assert refused.exit_code == 3
    assert "config.json" in refused.one_line()


@pytest.mark.parametrize("field", ["num_hidden_layers", "num_experts"])
@pytest.mark.parametrize("value", [10**7, 10**9, 2**53, -1])
def test_counts_that_no_model_has_are_refused_before_anything_is_built(tmp_path: Path, field: str, value: int) -> None:
    """The model is not built to be counted either: whoever could is never asked."""

    def count(_path: Path) -> dict[str, int]:
        raise AssertionError("asked to build it")

    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG | {field: value}))
    with pytest.raises(PocketMoEError, match=field) as caught:
        make_plan(PlanRequest(path, "laptop-16gb"), count)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("text", ["[" * 5000, '{"a":' * 5000, "1", "", "\udc80"], ids=range(5))
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    """Deep nesting, another type, nothing, and bytes that are no text."""
    path = tmp_path / "config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(PocketMoEError) as caught:
        read_config(path)
    assert caught.value.exit_code == 3
