"""Adapters are merged as peft merges them; what cannot be merged is refused, and so is one that nobody asked for.

The truth is peft's own: an adapter saved by it, loaded onto transformers' model, merged. Where peft no longer makes the
form (one module per expert, as older transformers had them), the truth is W + scaling * B @ A, written out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from pocketmoe.cli import main
from pocketmoe.errors import BadInput, UnsupportedModel
from pocketmoe.export.checkpoint import provenance
from pocketmoe.export.checkpoint.checkpoint import Checkpoint
from pocketmoe.export.checkpoint.weights import load_model
from pocketmoe.export.tensors.adapter import Adapter
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and peft loading the tiny models

Q = "model.layers.0.self_attn.q_proj"
EXPERTS = "model.layers.1.mlp.experts"


def loaded(root: Path, adapter: Path | None) -> dict[str, torch.Tensor]:
    """Every parameter of the checkpoint as an export reads it, experts stacked."""
    model, weights, experts = load_model(Checkpoint(root, adapter=adapter))
    state = dict(model.state_dict())
    for moe in experts.values():
        for name in moe.form.weights:
            target, stacked = moe.parameter(name, 0)
            assert stacked
            state[target] = torch.stack([weights.load_expert(moe, name, e) for e in range(moe.n_experts)])
    return state


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def peft_adapter(root: Path, target: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """Save an adapter with random values; the state of transformers' model with it merged in."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
    torch.manual_seed(1)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings})
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(target)
    again = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(again, target).merge_and_unload().state_dict()


SETTINGS = {
    "attention": {"target_modules": ["q_proj", "o_proj"]},
    "rank stabilized": {"target_modules": ["q_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "rank_pattern": {"k_proj": 2, r"layers\.1\.self_attn\.v_proj": 8},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 12},
    },
    "router and experts": {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "one of the experts' parameters": {"target_modules": ["v_proj"], "target_parameters": ["experts.down_proj"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "head trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_merged_as_peft_does(name: str, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    root = tiny_checkpoint("mixtral")
    wanted = peft_adapter(root, tmp_path / "adapter", **SETTINGS[name])
    plain = loaded(root, None)
    found = loaded(root, tmp_path / "adapter")
    assert any(not torch.equal(found[name], tensor) for name, tensor in plain.items())
    assert_close(found, wanted)


def test_experts_whose_matrices_lie_transposed(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    root, targets = tiny_checkpoint("gpt_oss"), ["experts.gate_up_proj", "experts.down_proj"]
    wanted = peft_adapter(root, tmp_path / "adapter", target_modules=[], target_parameters=targets)
    assert_close(loaded(root, tmp_path / "adapter"), wanted)


def write_adapter(root: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> Path:
    root.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "base_model_name_or_path": "someone/base", **settings}
    (root / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, root / "adapter_model.safetensors")
    return root


def pair(module: str, rows: int, columns: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"base_model.model.{module}.lora_A.weight": torch.randn(4, columns, generator=generator),
        f"base_model.model.{module}.lora_B.weight": torch.randn(rows, 4, generator=generator),
    }


@pytest.mark.parametrize("per_expert", [True, False])
def test_one_module_per_expert(per_expert: bool, tmp_path: Path) -> None:
    """As transformers had them before 5; some experts and projections only, whichever way the checkpoint keeps them."""
    root = tiny.save_checkpoint(tmp_path / "base", tiny.make_model("qwen3_moe"), save_original_format=per_expert)
    modules = {"3.gate_proj": (32, 64), "3.up_proj": (32, 64), "5.up_proj": (32, 64), "5.down_proj": (64, 32)}
    tensors: dict[str, torch.Tensor] = {}
    wanted = loaded(root, None)
    for seed, (module, shape) in enumerate(modules.items()):
        new = pair(f"{EXPERTS}.{module}", *shape, seed)
        a, b = new.values()
        tensors |= new
        expert, _, leaf = module.partition(".")
        stacked = wanted[f"{EXPERTS}.{'down_proj' if leaf == 'down_proj' else 'gate_up_proj'}"][int(expert)]
        part = stacked if leaf == "down_proj" else stacked[32 * (leaf == "up_proj") :][:32]
        part += 6 / 4 * (b @ a)
    assert_close(loaded(root, write_adapter(tmp_path / "adapter", tensors)), wanted)


@pytest.mark.parametrize("changed", ["model.embed_tokens", "lm_head"])
def test_a_tied_weight_that_is_changed_is_tied_no_longer(changed: str, tmp_path: Path) -> None:
    """As the adapter was trained: of one matrix in two places, only the one with the adapter changes."""
    root = tiny.save_checkpoint(tmp_path / "base", tiny.make_model("qwen3_moe"))
    plain = loaded(root, None)
    assert torch.equal(plain["lm_head.weight"], plain["model.embed_tokens.weight"])
    whole = {f"base_model.model.{changed}.weight": torch.randn(512, 64)}
    found = loaded(root, write_adapter(tmp_path / "adapter", whole))
    other = "lm_head" if changed == "model.embed_tokens" else "model.embed_tokens"
    assert torch.equal(found[f"{changed}.weight"], *whole.values())
    assert torch.equal(found[f"{other}.weight"], plain[f"{other}.weight"])


SHAPE = (64, 64)


@pytest.mark.parametrize(
    ("tensors", "settings", "kind", "words"),
    [
        (pair(Q, *SHAPE), {"peft_type": "IA3"}, UnsupportedModel, "'IA3'"),
        (pair(Q, *SHAPE), {"peft_type": None}, UnsupportedModel, "None"),
        (pair(Q, *SHAPE), {"use_dora": True}, UnsupportedModel, "use_dora"),
        (pair(Q, *SHAPE), {"layer_replication": [[0, 1], [0, 1]]}, UnsupportedModel, "layer_replication"),
        (pair(Q, *SHAPE), {"init_lora_weights": "pissa"}, UnsupportedModel, "pissa"),
        (pair(Q, *SHAPE), {"r": 8}, BadInput, "rank 8"),
        (pair(Q, *SHAPE), {"r": 0}, BadInput, "usable r"),
        (pair(Q, *SHAPE), {"lora_alpha": "many"}, BadInput, "lora_alpha"),
        (pair(Q, 63, 64), {}, BadInput, "[63, 64]"),
        (pair("model.layers.9.self_attn.q_proj", *SHAPE), {}, BadInput, "layers.9"),
        ({**pair(Q, *SHAPE), f"base_model.model.{Q}.lora_magnitude_vector": torch.ones(64)}, {}, BadInput, "magnitude"),
        (dict([next(iter(pair(Q, *SHAPE).items()))]), {}, BadInput, "but one of"),
        ({k: t.to(torch.int8) for k, t in pair(Q, *SHAPE).items()}, {}, BadInput, "I8"),
        ({k: t * float("nan") for k, t in pair(Q, *SHAPE).items()}, {}, BadInput, "NaN"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    tensors: dict[str, torch.Tensor],
    settings: dict[str, Any],
    kind: type[BadInput],
    words: str,
    tmp_path: Path,
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    adapter = write_adapter(tmp_path / "adapter", tensors, **settings)
    with pytest.raises(kind) as caught:
        load_model(Checkpoint(tiny_checkpoint("mixtral"), adapter=adapter))
    assert words in str(caught.value)
    assert str(adapter) in str(caught.value)
    assert caught.value.remedy


def test_an_adapter_alone_and_one_beside_a_model(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    """What would be lost without a word is asked for."""
    adapter = write_adapter(tmp_path / "adapter", pair(Q, *SHAPE))
    result = CliRunner().invoke(main, ["export", str(adapter), "-o", str(tmp_path / "bundle")])
    assert result.exit_code == 3
    assert "is an adapter of someone/base, not a whole model. Export its base model with it" in result.stderr
    assert f"pocketmoe export someone/base --adapter {adapter}" in result.stderr
    root = Path(shutil.copytree(tiny_checkpoint("mixtral"), tmp_path / "whole"))
    for path in adapter.iterdir():
        shutil.copy(path, root)
    with pytest.raises(BadInput, match="a whole model and an adapter") as caught:
        Checkpoint(root)
    assert f"--adapter {root}" in caught.value.remedy
    merged, plain = loaded(root, root), loaded(tiny_checkpoint("mixtral"), None)
    assert [name for name in plain if not torch.equal(merged[name], plain[name])] == [f"{Q}.weight"]


@pytest.mark.parametrize("name", [f"{Q}.lora_A.default.weight", f"{Q}.base_layer.weight"])
def test_an_adapter_inside_the_model_is_refused(
    name: str, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    root = Path(shutil.copytree(tiny_checkpoint("mixtral"), tmp_path / "whole"))
    tensors = load_file(root / "model.safetensors")
    tensors[name] = torch.zeros(4, 64)
    save_file(tensors, root / "model.safetensors")
    with pytest.raises(UnsupportedModel, match="not merged"):
        load_model(Checkpoint(root))


def test_a_bundle_depends_on_its_adapter(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    """What a killed export left is not gone on with for another; the bundle says what went into it."""
    root = tiny_checkpoint("mixtral")
    adapter = write_adapter(tmp_path / "adapter", pair(Q, *SHAPE))
    checkpoint = Checkpoint(root, adapter=adapter)
    plans = {provenance.plan(Checkpoint(root), ""), provenance.plan(checkpoint, "")}
    save_file(pair(Q, *SHAPE, seed=5), adapter / "adapter_model.safetensors")
    plans.add(provenance.plan(Checkpoint(root, adapter=adapter), ""))
    assert len(plans) == 3
    with pytest.raises(BadInput, match="changed while"):
        checkpoint.check_unchanged()
    with provenance.Hashes(Checkpoint(root, adapter=adapter)) as hashes:
        assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} < hashes.result().keys()
    assert "merge adapter" in provenance.describe(checkpoint).steps
    assert checkpoint.notes[0] == "the adapter adapter (LoRA, 1 modules) is merged into the weights"


@pytest.mark.parametrize("settings", ["", "[" * 100_000, "[]", '{"peft_type": ["LORA"]}'])
def test_settings_that_are_none(settings: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", pair(Q, *SHAPE))
    (adapter / "adapter_config.json").write_text(settings)
    with pytest.raises(BadInput, match=r"adapter_config\.json"):
        Adapter(adapter)
