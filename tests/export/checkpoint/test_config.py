"""config.json as its authors left it: transformers' answer, or a refusal that names the setting."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from pocketmoe.errors import BadInput, UnsupportedModel
from pocketmoe.export.capture import capture
from pocketmoe.export.checkpoint import config
from pocketmoe.export.checkpoint.checkpoint import Checkpoint
from pocketmoe.export.checkpoint.weights import load_model
from pocketmoe.export.convert import export_checkpoint
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.options import EngineOptions
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers loading the tiny models

FAMILIES = sorted(set(tiny.CONFIGS) - {"llama"})
LEFTOVERS: dict[str, Any] = {
    "use_cache": False,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_router_logits": True,
    "output_scores": True,
    "return_dict": False,
    "return_dict_in_generate": True,
    "use_return_dict": False,
    "tie_last_hidden_states": False,
    "dtype": "bf16",
    "torch_dtype": "auto",
    "use_bfloat16": True,
    "torchscript": True,
    "pretraining_tp": 2,
    "chunk_size_feed_forward": 4,
    "attn_implementation": "flash_attention_2",
    "_attn_implementation": "flash_attention_3",
    "_attn_implementation_internal": "flex_attention",
    "_attn_implementation_autoset": True,
    "experts_implementation": "deepgemm",
    "_experts_implementation": "sonicmoe",
    "_experts_implementation_internal": "megablocks",
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "router_aux_loss_coef": None,
    "aux_loss_alpha": "0.001",
    "aux_loss_coef": 0.1,
    "router_z_loss_coef": 0.1,
    "seq_aux": True,
    "initializer_range": None,
    "architectures": ["LlamaForSequenceClassification"],
    "transformers_version": 4.36,
    "problem_type": "single_label_classification",
    "finetuning_task": "mnli",
    "task_specific_params": {"summarization": {"num_beams": 4}},
    "id2label": {"zero": "A"},
    "label2id": ["A"],
    "num_labels": 1,
}
TRAINED = {"attention_dropout": 0.3, "hidden_dropout": 0.2, "layerdrop": 0.5, "pad_token_id": tiny.VOCAB}
PROMPT = list(range(5, 25))


def edit(root: Path, **changes: Any) -> None:
    path = root / config.FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint("mixtral"), tmp_path / "checkpoint"))


def refusal(root: Path) -> BadInput:
    with pytest.raises(BadInput) as caught:
        load_model(Checkpoint(root))
    return caught.value


def test_every_neutral_setting_is_tried() -> None:
    assert set(LEFTOVERS) == config.NEUTRAL


@pytest.mark.parametrize("family", FAMILIES)
def test_leftovers_of_training_leave_the_configuration_as_it_was(
    family: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    """So a bundle is the same too; three families are exported below."""
    path = tiny_checkpoint(family) / config.FILE
    plain = config.read_file(path)
    left = config.make_config(path, {**plain, **LEFTOVERS})
    assert left.to_dict() == config.make_config(path, plain).to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_leftovers_of_training_change_nothing(
    family: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """All of them at once, against transformers with the configuration as it was before training went over it."""
    source = tiny_checkpoint(family)
    root = Path(shutil.copytree(source, tmp_path / "checkpoint"))
    edit(root, **LEFTOVERS, **TRAINED)
    bundle = export_checkpoint(root, tmp_path / "bundle")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(torch.tensor([PROMPT])).logits[0].numpy()
    with Engine(bundle, EngineOptions(capacity=len(PROMPT))) as engine:
        assert np.abs(engine.feed(PROMPT, rows="all") - wanted).max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_neutral_settings_are_neutral_in_transformers(family: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    """Those that it takes, all at once, leave its logits where they were (it dies of return_dict: false)."""
    changes = {
        "use_cache": False,
        "output_router_logits": True,
        "output_hidden_states": True,
        "pretraining_tp": 2,
        "chunk_size_feed_forward": 4,
        "router_aux_loss_coef": 0.5,
        "aux_loss_alpha": 0.5,
        "initializer_range": 0.7,
        "gradient_checkpointing": True,
        "tie_last_hidden_states": False,
        "architectures": ["LlamaForCausalLM"],
        "pad_token_id": 3,
        "attention_dropout": 0.5,
    }
    source, ids = tiny_checkpoint(family), torch.tensor([PROMPT])
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    weights, plain = model.state_dict(), config.read_settings(source)
    with torch.no_grad():
        wanted = model(ids).logits

    def move(changed: dict[str, object]) -> bool:
        made = type(model.config).from_dict({**plain, **changed})
        other = AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
        other.load_state_dict(weights)
        with torch.no_grad():
            return bool((other(ids).logits - wanted).abs().max() >= 1e-5)

    assert not move(changes), [name for name, value in changes.items() if move({name: value})]


def test_jitter_is_not_neutral_everywhere(tiny_checkpoint: Callable[[str], Path]) -> None:
    """PhiMoE's router reads router_jitter_noise when it answers, so it must not be dropped."""
    source = tiny_checkpoint("phimoe")
    made = config.make_config(source / config.FILE, {**config.read_settings(source), "router_jitter_noise": 0.4})
    assert made.router_jitter_noise == 0.4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts_per_tok": "two"}, ["'num_experts_per_tok'", "'two'", "int"]),
        ({"bos_token_id": [0]}, ["'bos_token_id'", "[0]", "expected int"]),
        ({"hidden_act": "swoosh"}, ["'hidden_act'", "'swoosh'"]),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, ["rope", "'spiral'"]),
        ({"rms_norm_eps": "small"}, ["'rms_norm_eps'", "'small'"]),
        ({"hidden_size": -64}, ["'hidden_size'", "-64"]),
        ({"hidden_size": 2**53}, ["'hidden_size'", "9007199254740992"]),
        ({"num_attention_heads": 0}, ["'num_attention_heads'", "0"]),
        ({"num_hidden_layers": 10**6}, ["'num_hidden_layers'", "1000000"]),
        ({"max_position_embeddings": -3}, ["'max_position_embeddings'", "at least 1"]),
        ({"num_hidden_layers": 3}, ["'num_hidden_layers'", "3", "2 layers"]),
        ({"num_hidden_layers": 0}, ["'num_hidden_layers'", "at least 1"]),
        ({"num_local_experts": 10**7}, ["'num_local_experts'", "10000000"]),
        ({"num_local_experts": 60_000}, ["'num_local_experts'", "60000"]),
        ({"num_experts_per_tok": 0}, ["'num_experts_per_tok'", "at least 1"]),
        ({"layer_types": ["spiral_attention"] * 2}, ["'layer_types'", "spiral_attention"]),
        ({"sliding_window": "wide"}, ["'sliding_window'", "'wide'"]),
        ({"to_dict": 5}, ["'to_dict'"]),
        ({"model_type": 7}, ["'model_type'", "7"]),
        ({"model_type": "vit"}, ["no language model", "vit"]),
    ],
    ids=lambda value: "+".join(f"{k}={v}"[:40] for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_setting_is_refused_by_its_name(checkpoint: Path, changes: dict[str, Any], words: list[str]) -> None:
    edit(checkpoint, **changes)
    error = refusal(checkpoint)
    line = error.one_line()
    assert error.exit_code == 3
    assert len(line) < 800
    for word in [str(checkpoint), *words]:
        assert word in line
    if "model_type" not in changes:
        assert "architecture" not in line
        assert "ownload" not in line


def test_a_default_that_the_tensors_contradict_is_refused_by_its_name(checkpoint: Path) -> None:
    left = json.loads((checkpoint / config.FILE).read_text())
    del left["num_hidden_layers"]
    (checkpoint / config.FILE).write_text(json.dumps(left))
    line = refusal(checkpoint).one_line()
    assert "'num_hidden_layers' is not there" in line
    assert "2 layers" in line


@pytest.mark.parametrize("value", [3, 9, 10**4])
def test_what_transformers_cannot_compute_with_is_refused_by_its_name(checkpoint: Path, value: int) -> None:
    """More experts a token than there are: the model can be built, and only computing with it fails."""
    edit(checkpoint, num_experts_per_tok=value)
    if value <= 8:
        assert load_model(Checkpoint(checkpoint))
        return
    target = checkpoint.parent / "bundle"
    with pytest.raises(BadInput, match="'num_experts_per_tok' is") as caught:
        export_checkpoint(checkpoint, target)
    assert "architecture" not in caught.value.one_line()
    assert not list(target.parent.glob("*bundle*"))


@pytest.mark.parametrize(
    "change",
    [
        {"pad_token_id": tiny.VOCAB},
        {"pad_token_id": -1},
        {"pad_token_id": None},
        {"eos_token_id": [1, tiny.VOCAB + 7]},
        {"eos_token_id": -1},
        {"bos_token_id": None},
        {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}},
        {"auto_map": 5},
        {"architectures": -1},
        {"unknown_number": float("nan"), "limits": [0.0, float("inf")]},
        {"rope_scaling": None, "torch_dtype": "bfloat16"},
        {"quantization_config": None},
    ],
    ids=str,
)
def test_what_answers_do_not_depend_on_is_taken(checkpoint: Path, change: dict[str, Any]) -> None:
    edit(checkpoint, **change)
    model, weights, experts = load_model(Checkpoint(checkpoint))
    assert len(experts) == 2
    assert weights.unused == []
    capture.compute_shapes(model.to("meta"))


def test_special_floats_are_read_as_transformers_writes_them(checkpoint: Path) -> None:
    edit(checkpoint, time_step_limit=[0.0, {"__float__": "Infinity"}])
    assert Checkpoint(checkpoint).config.time_step_limit == [0.0, float("inf")]


def test_settings_of_a_nested_configuration_are_neutral_too() -> None:
    nested = {"text_config": {"use_cache": False, "hidden_size": 8, "sub": {"torch_dtype": "x"}}, "use_cache": False}
    assert config.for_inference(nested) == {"text_config": {"hidden_size": 8, "sub": {}}}


def test_a_missing_package_is_named(checkpoint: Path) -> None:
    """And neither the architecture nor the download is blamed."""

    def build(_settings: Any) -> None:
        raise ImportError("timm is required")

    with pytest.raises(UnsupportedModel, match=r"not installed \(timm is required\)") as caught:
        config.built(checkpoint / config.FILE, {}, build)
    assert caught.value.remedy == "Install it."


_NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**53, 10**6, 10**30, -(2**63)]),
    st.sampled_from([0.0, 0.5, -1.0, 1e308, float("nan"), float("inf"), float("-inf")]),
)
_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    _NUMBERS,
    st.sampled_from(["", "two", "auto", "eager", "silu", "default", "\ud800", "é" * 200]),
    st.lists(_NUMBERS, max_size=3),
    st.dictionaries(
        st.sampled_from(["rope_type", "type", "factor", "rope_theta", "0"]), _NUMBERS | st.text(max_size=3)
    ),
)
_FOREIGN = [
    "rope_scaling",
    "text_config",
    "quantization_config",
    "auto_map",
    "per_layer_config",
    "to_dict",
    "__class__",
]
_FOREIGN += ["attribute_map", "name_or_path", "is_encoder_decoder", "layer_types", "head_dim", "_name_or_path"]


def check_mutated(source: Path, root: Path, changes: dict[str, Any], dropped: list[str]) -> str:
    """Read such a config.json and compute with the model that it describes; the error's class, or that it works."""
    plain = json.loads((source / config.FILE).read_text())
    mutated = {name: value for name, value in {**plain, **changes}.items() if name not in dropped}
    (root / config.FILE).write_text(json.dumps(mutated))
    error: BadInput | None = None
    try:
        opened = Checkpoint(root)
        made = config.make_model(root / config.FILE, opened.settings, opened.config)
        config.check_computes(root / config.FILE, opened.settings, capture.compute_shapes)
        assert made.config.use_cache is True
    except BadInput as raised:
        error = raised
    if error is None:
        return "works"
    line = error.one_line()
    assert error.exit_code == 3
    assert error.remedy
    assert "\n" not in line
    assert len(line) < 1000
    assert line.encode()
    return type(error).__name__


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_any_config_is_taken_or_refused(family: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Fields dropped, of a wrong type, extreme, not a number: never another exception, one line, exit code 3."""
    source = tiny_checkpoint(family)
    for path in source.glob("*.safetensors"):
        (tmp_path / path.name).hardlink_to(path)
    names = sorted({*json.loads((source / config.FILE).read_text()), *config.NEUTRAL, *_FOREIGN})
    seen = set()

    @settings(
        max_examples=30, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
    )
    @given(
        st.dictionaries(st.sampled_from(names), _VALUES, max_size=3),
        st.lists(st.sampled_from(names), max_size=2),
    )
    def mutate(changes: dict[str, Any], dropped: list[str]) -> None:
        seen.add(check_mutated(source, tmp_path, changes, dropped))

    mutate()
    assert {"works", "BadInput"} <= seen


def test_a_window_of_one_token_is_refused_by_name() -> None:
    """transformers keeps all of the text in its cache then, so that its answers with and without it differ."""
    path, settings = Path(config.FILE), {"model_type": "mixtral", "sliding_window": 1}
    with pytest.raises(BadInput, match="'sliding_window' is 1: transformers answers otherwise"):
        config.check_sizes(path, settings)
    config.check_sizes(path, settings | {"sliding_window": 2})
