"""Configurations, assumptions and prices that are absurd: an answer or one line, never a traceback or a gigabyte."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pocketmoe.cli import main
from pocketmoe.errors import PocketMoEError
from pocketmoe.profiles.estimate.shapes import read_config
from pocketmoe.profiles.plan.planning import PlanRequest, make_plan, read_model
from tests.profiles.profiles import make_profile
from tests.profiles.profiles import write as write_profile

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
GPU = """
[[gpu]]
name = "X"
memory_bytes = 1e9
bandwidth_bytes_per_s = 1e9
dense_flops_per_s = {flops}
watts = 1
source = "here"
as_of = 2026-11-01
confidence = "V"
"""
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


ASSUMPTIONS = [
    (option.opts[0], end)
    for option in main.commands["compare"].params
    if isinstance(option.type, click.FloatRange | click.IntRange) and option.name not in ("requests", "timeout")
    for end in (option.type.min, option.type.max, sys.float_info.min)
    if end != sys.float_info.min or (isinstance(option.type, click.FloatRange) and option.type.min == 0)
]


@pytest.mark.parametrize(("option", "end"), ASSUMPTIONS)
def test_a_comparison_holds_at_the_ends_of_every_assumption(tmp_path: Path, option: str, end: float) -> None:
    """The largest, the least, and the least above zero give a table, a record and a page, or one line."""
    profile = write_profile(tmp_path, make_profile())
    found = CliRunner().invoke(main, ["compare", str(profile), "-o", str(tmp_path / "out"), option, repr(end)])
    expected = 2 if option == "--resale" and end == 1e9 else 0
    assert found.exit_code == expected, (found.stderr, found.exception)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a = " + "9" * 4097, "characters"),
        ("a." * 5000 + "b = 1", "characters"),
        ("[" * 3000, "is not TOML"),
        (GPU.format(flops="1e-300"), "dense_flops_per_s"),
        (GPU.format(flops="nan"), "dense_flops_per_s"),
        (GPU.format(flops="inf"), "dense_flops_per_s"),
    ],
    ids=["digits", "dotted key", "nesting", "1e-300", "nan", "inf"],
)
def test_prices_that_cannot_be_are_refused(tmp_path: Path, text: str, words: str) -> None:
    """Digits and keys without end, nesting, and rates with which nothing can be reckoned."""
    prices = tmp_path / "prices.toml"
    prices.write_text(text)
    profile = write_profile(tmp_path, make_profile())
    found = CliRunner().invoke(main, ["compare", str(profile), "--json", "--prices", str(prices)])
    assert (found.exit_code, found.stdout) == (3, ""), (found.stderr, found.exception)
    assert words in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


def test_a_measurement_nested_deep_is_refused(tmp_path: Path) -> None:
    """endpoint.json of ten thousand brackets."""
    path = tmp_path / "endpoint.json"
    path.write_text('{"levels":' + "[" * 10_000)
    profile = write_profile(tmp_path, make_profile())
    found = CliRunner().invoke(main, ["compare", str(profile), "--json", "--measurement", str(path)])
    assert found.exit_code == 3, (found.stderr, found.exception)
    assert len(found.stderr.strip().splitlines()) == 1
