"""Checkpoints in eight-bit floats, in each form that is published, are read as the numbers they stand for.

The truth is plain arithmetic, block by block, and transformers' own dequantization where it takes the shape.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pocketmoe.errors import BadInput, UnsupportedModel
from pocketmoe.export.checkpoint.checkpoint import Checkpoint
from pocketmoe.export.checkpoint.weights import load_model
from pocketmoe.export.tensors.shards import SINGLE
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers loading the tiny models

BLOCK = (48, 40)  # neither divides the tiny model's 64: the last blocks are cut, as in DeepSeek-V3's kv_a_proj
DEEPSEEK = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}
LARGEST = torch.finfo(torch.float8_e4m3fn).max

Form = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def by_block(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and what they stand for, of a matrix [rows, columns] or of several."""
    if weight.ndim == 3:
        parts = [by_block(matrix) for matrix in weight]
        return tuple(torch.stack([part[i] for part in parts]) for i in range(3))  # type: ignore[return-value]
    rows, columns = (-(-size // block) for size, block in zip(weight.shape, BLOCK, strict=True))
    codes, scales = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    plain = torch.empty_like(weight)
    for i in range(rows):
        for j in range(columns):
            place = (slice(i * BLOCK[0], (i + 1) * BLOCK[0]), slice(j * BLOCK[1], (j + 1) * BLOCK[1]))
            scales[i, j] = weight[place].abs().max() / LARGEST
            codes[place] = (weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
            plain[place] = codes[place].to(torch.float32) * scales[i, j]
    return codes, scales, plain


def by_tensor(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale = weight.abs().max() / LARGEST
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return codes, scale, codes.to(torch.float32) * scale


def by_row(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale = weight.abs().amax(-1, keepdim=True) / LARGEST
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return codes, scale, codes.to(torch.float32) * scale


def store(root: Path, form: Form, suffix: str, settings: dict[str, object]) -> Path:
    """Store the checkpoint's matrices in eight bits; the directory of one with what they stand for."""
    tensors, plain = load_file(root / SINGLE), {}
    for name, tensor in list(tensors.items()):
        plain[name] = tensor
        linear = ("proj" in name or "mlp" in name) and "gate.weight" not in name
        if tensor.ndim < 2 or not linear:
            continue
        tensors[name], scale, plain[name] = form(tensor)
        tensors[f"{name}{suffix}"] = scale
        if suffix == "_scale":
            tensors[f"{name.removesuffix('weight')}input_scale"] = torch.tensor(0.5)
    twin = root.with_name(f"{root.name}-plain")
    twin.mkdir()
    for path in root.iterdir():
        (twin / path.name).write_bytes(path.read_bytes())
    save_file(plain, twin / SINGLE, metadata={"format": "pt"})
    save_file(tensors, root / SINGLE, metadata={"format": "pt"})
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return twin


def assert_same(root: Path, twin: Path) -> None:
    """Both directories' models have the same weights, dense ones and experts."""
    found, weights, experts = load_model(Checkpoint(root))
    wanted, truth, _ = load_model(Checkpoint(twin))
    assert weights.unused == []
    streamed = {name for moe in experts.values() for name in moe.parameters()}
    assert streamed
    for name, tensor in wanted.state_dict().items():
        if name not in streamed:
            assert torch.equal(found.state_dict()[name], tensor), name
    for moe in experts.values():
        for name in moe.form.weights:
            for expert in range(moe.n_experts):
                one = weights.load_expert(moe, name, expert)
                assert torch.equal(one, truth.load_expert(moe, name, expert)), (moe.name, name)


@pytest.mark.parametrize(
    ("model_type", "per_expert", "form", "suffix", "settings"),
    [
        ("deepseek_v3", True, by_block, "_scale_inv", DEEPSEEK),
        ("olmoe", False, by_block, "_scale_inv", DEEPSEEK),
        ("mixtral", True, by_tensor, "_scale", {"quant_method": "fp8", "activation_scheme": "static"}),
        ("qwen3_moe", True, by_row, "_scale", {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    ],
    ids=["DeepSeek-V3", "experts fused", "one scale, static", "compressed-tensors"],
)
def test_read_as_what_they_stand_for(
    model_type: str, per_expert: bool, form: Form, suffix: str, settings: dict[str, object], tmp_path: Path
) -> None:
    root = tmp_path / "checkpoint"
    tiny.save_checkpoint(root, tiny.make_model(model_type), save_original_format=per_expert)
    assert_same(root, store(root, form, suffix, settings))


def test_as_transformers_dequantizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operation takes whole blocks only, so here they are whole."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    monkeypatch.setattr("tests.export.tensors.test_fp8.BLOCK", (16, 32))
    codes, scale, plain = by_block(torch.randn(64, 96, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32), plain)
    tiny.save_checkpoint(tmp_path, tiny.make_model("olmoe"))
    tensors = {"a.weight": codes, "a.weight_scale_inv": scale}
    save_file(tensors, tmp_path / SINGLE)
    config = json.loads((tmp_path / "config.json").read_text())
    settings = {**DEEPSEEK, "weight_block_size": [16, 32]}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.keys == ["a.weight"]
    assert torch.equal(checkpoint.read("a.weight"), plain)


@pytest.fixture
def eight_bit(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny DeepSeek-V3 in eight bits that a test may damage."""
    root = tmp_path / "checkpoint"
    root.mkdir()
    for path in tiny_checkpoint("deepseek_v3").iterdir():
        (root / path.name).write_bytes(path.read_bytes())
    store(root, by_block, "_scale_inv", DEEPSEEK)
    return root


NAME = "model.layers.1.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("damage", "kind", "words"),
    [
        (lambda t: t.update({f"{NAME}_scale_inv": torch.ones(9, 9)}), BadInput, "its scale [9, 9]"),
        (lambda t: t.update({f"{NAME}_scale_inv": torch.ones(2, 2, dtype=torch.uint8)}), UnsupportedModel, "uint8"),
        (lambda t: t.pop(f"{NAME}_scale_inv"), UnsupportedModel, "F8_E4M3, without a scale"),
        (lambda t: t[NAME].view(torch.uint8)[0].fill_(0x7F), BadInput, "NaN"),
    ],
    ids=["scale of another shape", "scale of exponents", "no scale", "NaN"],
)
def test_damage_is_named(
    eight_bit: Path, damage: Callable[[dict[str, torch.Tensor]], object], kind: type[BadInput], words: str
) -> None:
    tensors = load_file(eight_bit / SINGLE)
    damage(tensors)
    save_file(tensors, eight_bit / SINGLE)
    with pytest.raises(kind) as caught:
        Checkpoint(eight_bit).read(NAME)
    assert NAME in str(caught.value)
    assert words in str(caught.value)
