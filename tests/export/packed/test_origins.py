"""Checkpoints that are quantized already: each format is read as its own library dequantizes it, bit for bit.

`benchmarks/quantized_origins.py` holds the same makers against the libraries themselves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pocketmoe.errors import BadInput, UnsupportedModel
from pocketmoe.export.checkpoint.checkpoint import Checkpoint
from pocketmoe.export.checkpoint.weights import load_model
from pocketmoe.export.packed.grid import unpack_bits
from tests import tiny
from tests.export.tensors.test_published import assert_equal, edit, read
from tests.quantized import ORIGINS, Origin, Tensors, gptq, pack_words, quantize_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers loading the tiny models

Q = "model.layers.0.self_attn.q_proj"
W4 = "compressed-tensors w4a16"
EXPERT = "model.layers.0.mlp.experts.1.up_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2-MoE, with a shared expert and biases, whose rows are long enough for two groups."""
    sizes = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_experts": 2, "vocab_size": 64}
    model = tiny.make_model("qwen2_moe", num_hidden_layers=1, intermediate_size=64, **sizes)
    return tiny.save_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint", model)


@pytest.fixture
def make(source: Path, tmp_path: Path) -> Any:
    def make(origin: Origin) -> tuple[Path, Path]:
        """The checkpoint in a format, and its twin of plain values."""
        quantize_checkpoint(source, tmp_path / "packed", tmp_path / "plain", origin)
        return tmp_path / "packed", tmp_path / "plain"

    return make


@pytest.mark.parametrize("name", ORIGINS)
def test_each_format_is_read_as_its_library_dequantizes_it(name: str, make: Any) -> None:
    """Every tensor equals that of the checkpoint of plain values, and has its name and shape."""
    root, plain = make(ORIGINS[name])
    checkpoint, twin = Checkpoint(root), Checkpoint(plain)
    assert sorted(checkpoint.keys) == sorted(twin.keys)
    assert len(checkpoint.packed) == 14
    for key in twin.keys:
        assert checkpoint.shape(key) == twin.shape(key)
        assert torch.equal(checkpoint.read(key), twin.read(key)), key
    assert checkpoint.origin == ORIGINS[name].words


@pytest.mark.parametrize("name", ["gptq act-order", "bitsandbytes nf4, nested"])
def test_experts_are_fused_as_transformers_fuses_them(name: str, make: Any) -> None:
    root, plain = make(ORIGINS[name])
    assert_equal(read(root), read(plain))
    assert load_model(Checkpoint(root))[1].unused == []


@settings(max_examples=60, deadline=None, derandomize=True)
@given(bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8]), n=st.integers(1, 70), data=st.data())
def test_codes_come_out_of_words_as_they_went_in(bits: int, n: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=n, max_size=n))
    words = pack_words(torch.tensor([codes, codes[::-1]]).numpy(), bits)
    assert unpack_bits(words, bits, n).tolist() == [codes, codes[::-1]]


# -- settings as they are met ----------------------------------------------------------------------------------------


def mixed(weight: torch.Tensor) -> Any:
    """Experts' down projections, which alone have so many rows, in eight bits."""
    return gptq(8 if weight.shape == (64, 64) else 4, 32)(weight)


def test_bits_that_differ_by_module(make: Any) -> None:
    """`dynamic` (gptqmodel): the tensors tell anyhow, whatever its patterns say."""
    dynamic = {"+:.*down_proj": {"bits": 8}, "-:.*lm_head": {}, "(": {"bits": 3}}
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": dynamic}
    root, plain = make(Origin(mixed, config, ""))
    checkpoint, twin = Checkpoint(root), Checkpoint(plain)
    assert all(torch.equal(checkpoint.read(key), twin.read(key)) for key in twin.keys)
    assert "GPTQ 8 bits, group 32 (" in str(checkpoint.origin)
    assert "GPTQ 4 bits, group 32 (" in str(checkpoint.origin)


def test_what_is_not_converted_stays_as_it_is(make: Any, source: Path) -> None:
    """modules_to_not_convert and its like: plain tensors among packed ones."""
    root, plain = make(ORIGINS["awq 4 bits"])
    original = load_file(source / "model.safetensors")

    def restore(tensors: Tensors) -> None:
        for part in ("qweight", "qzeros", "scales"):
            del tensors[f"{Q}.{part}"]
        tensors[f"{Q}.weight"] = original[f"{Q}.weight"]

    edit(root, restore)
    checkpoint, twin = Checkpoint(root), Checkpoint(plain)
    assert torch.equal(checkpoint.read(f"{Q}.weight"), original[f"{Q}.weight"])
    assert torch.equal(checkpoint.read(f"{EXPERT}.weight"), twin.read(f"{EXPERT}.weight"))


def test_scales_of_caches_and_leftovers_are_let_go(make: Any) -> None:
    root, _ = make(ORIGINS["compressed-tensors w4a16"])
    left = {"model.layers.0.self_attn.k_scale": torch.ones(1), f"{Q}.weight_g_idx": -torch.ones(64, dtype=torch.int32)}
    edit(root, lambda tensors: tensors.update(left))
    assert load_model(Checkpoint(root))[1].unused == []


# -- what does not fit together --------------------------------------------------------------------------------------


def change(name: str, to: Any) -> Any:
    def apply(tensors: Tensors) -> None:
        value = to(tensors.pop(name))
        if value is not None:
            tensors[name] = value.contiguous()

    return apply


WRONG: list[tuple[str, Any, tuple[str, ...], type[BadInput]]] = [
    ("gptq 4 bits", change(f"{Q}.scales", lambda t: None), ("qweight", "scales"), UnsupportedModel),
    ("gptq 4 bits", change(f"{Q}.qzeros", lambda t: t[:1]), ("qweight", "zero points [1, 8]"), BadInput),
    ("gptq 4 bits", change(f"{Q}.qweight", lambda t: t[:, :5]), ("qweight", "neither as GPTQ nor as AWQ"), BadInput),
    ("gptq 4 bits", change(f"{Q}.qweight", lambda t: t.float()), (f"{Q}.qweight", "F32"), BadInput),
    ("gptq 4 bits", change(f"{Q}.g_idx", lambda t: t + 7), (f"{Q}.qweight", "groups from 7 to 8"), BadInput),
    ("gptq 4 bits", change(f"{Q}.g_idx", lambda t: -t), (f"{Q}.qweight", "groups from -1"), BadInput),
    ("gptq 4 bits", change(f"{Q}.g_idx", lambda t: t[:9]), (f"{Q}.g_idx", "[9]"), BadInput),
    ("gptq act-order", change(f"{Q}.g_idx", lambda t: t * 0), (f"{Q}.qweight", "zeros alone"), BadInput),
    ("gptq 4 bits", lambda t: t.update({f"{Q}.weight": torch.ones(64, 64)}), ("both stand for",), BadInput),
    ("awq 4 bits", change(f"{Q}.scales", lambda t: t[:, :32]), (f"{Q}.qweight", "fits neither"), BadInput),
    (W4, change(f"{Q}.weight_scale", lambda t: None), ("_packed", "weight_scale"), UnsupportedModel),
    (W4, change(f"{Q}.weight_shape", lambda t: t * 3), ("_packed", "[192, 192]"), BadInput),
    (W4, change(f"{Q}.weight_scale", lambda t: t[:, :1].repeat(1, 5)), ("[64, 5]",), BadInput),
    ("nvfp4, compressed-tensors", change(f"{Q}.weight_scale", lambda t: t[:3]), ("_packed", "[3, 4]"), BadInput),
    ("nvfp4, modelopt", change(f"{Q}.weight_scale", lambda t: t.float()), (f"{Q}.weight", "eight-bit"), BadInput),
    ("bitsandbytes nf4", change(f"{Q}.weight", lambda t: t[:9]), ("says [64, 64] in blocks of 64",), BadInput),
    ("bitsandbytes nf4", change(f"{Q}.weight.absmax", lambda t: t[:9]), ("says [64, 64] in blocks of 64",), BadInput),
    ("bitsandbytes nf4", change(f"{Q}.weight.quant_state.bitsandbytes__nf4", lambda t: t[:-1]), ("no JSON",), BadInput),
    ("bitsandbytes nf4, nested", change(f"{Q}.weight.nested_absmax", lambda t: None), ("absmax of octets",), BadInput),
    ("bitsandbytes int8", change(f"{Q}.weight_format", lambda t: t + 1), ("layout other than rows",), UnsupportedModel),
    ("bitsandbytes int8", change(f"{Q}.SCB", lambda t: t[:5]), (f"{Q}.SCB", "[64, 64]"), BadInput),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_parts_that_do_not_fit_are_refused_by_name(case: int, make: Any) -> None:
    """When the headers are read, or at the latest when the tensor is: one line with file and name."""
    name, damage, words, kind = WRONG[case]
    root, _ = make(ORIGINS[name])
    edit(root, damage)
    with pytest.raises(kind) as caught:
        Checkpoint(root).read(f"{Q}.weight")
    line = caught.value.one_line()
    assert all(word in line for word in (*words, "model.safetensors")), line
    assert caught.value.remedy


def turned(*places: str) -> dict[str, Any]:
    """A transform_config of compressed-tensors that applies to these places."""
    apply = [{"targets": ["Linear"], "location": place, "inverse": False} for place in places]
    return {"config_groups": {"R": {"type": "hadamard", "apply": apply}}}


@pytest.mark.parametrize(
    "settings", [{"transform_config": turned("weight_input", "weight_output")}, {"transform_config": {}}]
)
def test_rotations_that_are_in_the_weights_change_nothing(settings: dict[str, Any], make: Any) -> None:
    root, _ = make(ORIGINS["compressed-tensors w4a16"])
    before = Checkpoint(root).read(f"{EXPERT}.weight")
    stated = json.loads((root / "config.json").read_text())["quantization_config"]
    edit(root, lambda _: None, {"quantization_config": {**stated, **settings}})
    assert torch.equal(Checkpoint(root).read(f"{EXPERT}.weight"), before)


@pytest.mark.parametrize(
    ("name", "settings", "word"),
    [
        ("gptq 4 bits", {"checkpoint_format": "marlin"}, "marlin"),
        ("gptq 4 bits", {"is_marlin_format": True}, "marlin"),
        ("gptq 4 bits", {"format": "bitblas"}, "bitblas"),
        ("gptq 4 bits", {"checkpoint_format": "gptq_p"}, "gptq_p"),
        ("awq 4 bits", {"version": "gemv"}, "gemv"),
        ("awq 4 bits", {"version": "GEMV_FAST"}, "gemv_fast"),
        ("compressed-tensors w4a16", {"format": "marlin-24"}, "marlin-24"),
        ("compressed-tensors w4a16", {"transform_config": turned("weight_output", "input")}, "transform_config"),
        ("compressed-tensors w4a16", {"transform_config": {"config_groups": {"R4": {}}}}, "transform_config"),
        ("gptq 4 bits", {"hadamard_config": {"hadamard_type": "hadamard"}}, "hadamard_config"),
        ("gptq 4 bits", {"rotation_config": "random"}, "rotation_config"),
    ],
)
def test_layouts_that_are_not_read_are_refused_by_name(
    name: str, settings: dict[str, Any], word: str, make: Any
) -> None:
    root, _ = make(ORIGINS[name])
    stated = json.loads((root / "config.json").read_text())["quantization_config"]
    edit(root, lambda _: None, {"quantization_config": {**stated, **settings}})
    with pytest.raises(UnsupportedModel) as caught:
        Checkpoint(root)
    assert word in caught.value.one_line()
    assert "unquantized" in str(caught.value.remedy)


def test_a_scale_that_is_not_finite_is_refused_by_name(make: Any) -> None:
    root, _ = make(ORIGINS["awq 4 bits"])
    edit(root, change(f"{EXPERT}.scales", lambda t: t * torch.inf))
    with pytest.raises(BadInput) as caught:
        Checkpoint(root).read(f"{EXPERT}.weight")
    assert f"{EXPERT}.qweight" in caught.value.one_line()
