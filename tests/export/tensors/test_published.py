"""Weights as their authors publish them: read as transformers reads them, or refused by name, dtype and method.

Nothing is computed in these tests, and nothing before a refusal: the headers of the files say it all.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pocketmoe.errors import BadInput, DamagedFile, PocketMoEError, UnsupportedModel
from pocketmoe.export.checkpoint.checkpoint import Checkpoint
from pocketmoe.export.checkpoint.weights import load_model
from pocketmoe.export.tensors.shards import INDEX, SINGLE, Shards
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers loading the tiny models

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
Q = "model.layers.0.self_attn.q_proj.weight"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 123456\n"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def root(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a tiny Qwen3-MoE, whose embedding and head are tied, that a test may change."""
    return Path(shutil.copytree(tiny_checkpoint("qwen3_moe"), tmp_path / "checkpoint"))


def edit(root: Path, change: Callable[[Tensors], object], config: dict[str, Any] | None = None) -> None:
    tensors = load_file(root / SINGLE)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, root / SINGLE)
    stated = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps({**stated, **(config or {})}))


def read(root: Path) -> Tensors:
    """Every parameter as an export reads it, experts stacked."""
    model, weights, experts = load_model(Checkpoint(root))
    state = dict(model.state_dict())
    for moe in experts.values():
        for name in moe.form.weights:
            target = moe.parameter(name, 0)[0]
            state[target] = torch.stack([weights.load_expert(moe, name, e) for e in range(moe.n_experts)])
    return state


def as_transformers_reads(root: Path) -> Tensors:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32).state_dict()


def assert_equal(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def refused(root: Path, *words: str, kind: type[BadInput] = BadInput) -> None:
    with pytest.raises(kind) as caught:
        load_model(Checkpoint(root))
    line = caught.value.one_line()
    for word in words:
        assert word in line, line
    assert caught.value.remedy


def each(change: Callable[[torch.Tensor], torch.Tensor], *names: str) -> Callable[[Tensors], None]:
    """Change the tensors of these names, or all matrices of projections."""

    def apply(tensors: Tensors) -> None:
        for name in names or [name for name in tensors if "_proj.weight" in name]:
            tensors[name] = change(tensors[name])

    return apply


# -- eight-bit floats ------------------------------------------------------------------------------------------------

LARGEST = 448.0
CT = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"]}


def blocks(rows: int, columns: int, dtype: torch.dtype = torch.float8_e4m3fn) -> Callable[..., Any]:
    """Codes and one scale per block: from the format's definition, element by element."""

    def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        r, c = rows or weight.shape[0], columns or weight.shape[1]
        scales = torch.empty(-(-weight.shape[0] // r), -(-weight.shape[1] // c))
        codes, plain = torch.empty_like(weight).to(dtype), torch.empty_like(weight)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                place = slice(i * r, i * r + r), slice(j * c, j * c + c)
                scales[i, j] = weight[place].abs().max() / LARGEST
                codes[place] = (weight[place] / scales[i, j]).to(dtype)
                plain[place] = codes[place].float() * scales[i, j]
        return codes, scales, plain

    return quantize


def groups(**weights: Any) -> dict[str, Any]:
    return {"quantization_config": {**CT, "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}}


MODELOPT = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
FORMS: dict[str, tuple[Callable[..., Any], str, Callable[[torch.Tensor], torch.Tensor], dict[str, Any]]] = {
    "compressed-tensors, tensor": (blocks(0, 0), "weight_scale", lambda s: s.reshape(1), groups(strategy="tensor")),
    "compressed-tensors, channel": (blocks(1, 0), "weight_scale", lambda s: s, groups(strategy="channel")),
    "compressed-tensors, block": (
        blocks(24, 40),
        "weight_scale",
        lambda s: s.bfloat16().float(),
        groups(strategy="block", block_structure=[24, 40]),
    ),
    "compressed-tensors, block as text": (
        blocks(24, 40), "weight_scale", lambda s: s, groups(strategy="block", block_structure="24x40"),
    ),
    "compressed-tensors, group": (
        blocks(1, 16), "weight_scale", lambda s: s, groups(strategy="group", group_size=16),
    ),
    "modelopt": (blocks(0, 0), "weight_scale", lambda s: s.reshape(()), MODELOPT),
    "modelopt, per channel": (blocks(1, 0), "weight_scale", lambda s: s.reshape(-1), MODELOPT),
    "modelopt, blocks with axes of one": (blocks(16, 16), "weight_scale", lambda s: s[:, None, :, None], MODELOPT),
    "fbgemm": (blocks(1, 0), "weight_scale", lambda s: s, {"quantization_config": {"quant_method": "fbgemm_fp8"}}),
    "e5m2": (blocks(1, 0, torch.float8_e5m2), "weight_scale", lambda s: s, groups(strategy="channel")),
    "DeepSeek-V4's names": (blocks(32, 32), "scale", lambda s: s, {"quantization_config": {"quant_method": "fp8"}}),
    "nothing said": (blocks(16, 16), "weight_scale_inv", lambda s: s, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_eight_bit_floats_in_the_spellings_in_use(name: str, root: Path) -> None:
    quantize, leaf, shape, config = FORMS[name]
    wanted = load_file(root / SINGLE)
    stored = dict(wanted)
    for key, tensor in wanted.items():
        if "_proj.weight" in key:
            codes, scale, _ = quantize(tensor)
            stored_scale = shape(scale)
            factors = stored_scale.reshape(scale.shape)
            rows = torch.arange(tensor.shape[0]) * scale.shape[0] // tensor.shape[0]
            if "24" in name or ("block" in name and "compressed" in name):
                rows = torch.arange(tensor.shape[0]) // 24
                columns = torch.arange(tensor.shape[1]) // 40
            else:
                columns = torch.arange(tensor.shape[1]) * scale.shape[1] // tensor.shape[1]
            wanted[key] = codes.float() * factors[rows][:, columns]
            stored[key] = codes
            stored[key.replace("weight", leaf)] = stored_scale
            stored[key.replace("weight", "input_scale")] = torch.tensor(0.5)
    twin = Path(shutil.copytree(root, root.parent / "twin"))
    save_file(wanted, twin / SINGLE)
    edit(root, lambda tensors: (tensors.clear(), tensors.update(stored)), config)
    assert_equal(read(root), read(twin))
    assert load_model(Checkpoint(root))[1].unused == []


def test_modelopt_says_it_in_a_file_of_its_own(root: Path) -> None:
    (root / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4", "exclude_modules": []}}')
    assert Checkpoint(root).quantization.method == "modelopt NVFP4"
    edit(root, each(lambda w: torch.zeros(w.shape[0], w.shape[1] // 2, dtype=torch.uint8)))
    refused(root, "U8", "hf_quant_config.json", "NVFP4", kind=UnsupportedModel)


@pytest.mark.parametrize("shape", [(64, 100), (3, 3), (2, 5), (33, 1), (0, 4)])
def test_scales_that_could_mean_several_things_are_refused(shape: tuple[int, int], root: Path) -> None:
    """[64, 128] by 5 columns could be blocks of 26 to 31; config.json does not say which."""
    edit(root, lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn), f"{Q}_scale": torch.ones(shape)}))
    refused(root, Q, f"its scale {list(shape)}")


# -- what is no plain number -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool])
@pytest.mark.parametrize("name", [EXPERT, EMBED, Q, "model.norm.weight"])
def test_integers_are_not_taken_for_floats(name: str, dtype: torch.dtype, root: Path) -> None:
    """One expert alone, the embedding alone: each tensor is looked at."""
    edit(root, each(lambda w: (w * 100).to(dtype), name))
    stored = {"int8": "I8", "uint8": "U8", "int32": "I32", "int64": "I64", "bool": "BOOL"}[str(dtype).split(".")[1]]
    refused(root, name, stored, "does not say how", kind=UnsupportedModel)


def renamed(ending: str, dtype: torch.dtype) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        for name in [name for name in tensors if "_proj.weight" in name]:
            tensors[name.removesuffix(".weight") + ending] = tensors.pop(name).to(dtype)

    return apply


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (renamed(".qweight", torch.int32), {"quantization_config": {"quant_method": "gptq"}}, ("qweight", "gptq")),
        (renamed(".qweight", torch.int32), {"quantization_config": {"quant_method": "awq"}}, ("I32", "says: awq")),
        (renamed(".qweight", torch.int32), {}, ("GPTQ or AWQ",)),
        (
            renamed(".weight_packed", torch.int32),
            {"compression_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
            ("weight_packed", "I32", "pack-quantized"),
        ),
        (
            each(lambda w: w.to(torch.uint8).reshape(-1, 1)),
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            ("U8", "bitsandbytes"),
        ),
        (
            each(lambda w: w.to(torch.int8)),
            {"text_config": {"quantization_config": {"quant_method": "x"}}},
            ("I8", "x"),
        ),
        (renamed("_blocks", torch.uint8), {"quantization_config": {"quant_method": "mxfp4"}}, ("_blocks", "mxfp4")),
    ],
)
def test_packed_weights_are_refused_by_method_and_dtype(
    change: Callable[[Tensors], None],
    config: dict[str, Any],
    words: tuple[str, ...],
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before a tensor is read."""
    edit(root, change, config)
    monkeypatch.setattr(Shards, "read", lambda *_: pytest.fail("a tensor was read"))
    refused(root, *words, "unquantized", kind=UnsupportedModel)


@pytest.mark.parametrize("method", ["bitsandbytes", "fp8", "fbgemm_fp8", "mxfp4", "modelopt", None])
def test_settings_left_beside_plain_weights_are_noted(method: Any, root: Path) -> None:
    wanted = read(root)
    edit(root, lambda _: None, {"quantization_config": {"quant_method": method, "load_in_4bit": True}})
    assert_equal(read(root), wanted)
    (note,) = Checkpoint(root).notes
    assert "config.json says that the weights are quantized" in note
    assert (method or "bitsandbytes") in note


@pytest.mark.parametrize("method", ["gptq", "awq", 7, ""])
def test_settings_that_plain_weights_contradict_are_refused(method: Any, root: Path) -> None:
    edit(root, lambda _: None, {"quantization_config": {"quant_method": method}})
    refused(root, "config.json", method if method and isinstance(method, str) else "unknown way", "Take that entry out")


# -- names -----------------------------------------------------------------------------------------------------------


def other(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flip(0).clone()


@pytest.mark.parametrize(
    "change",
    [
        lambda t: None,
        lambda t: t.update({HEAD: t.pop(EMBED)}),
        lambda t: t.update({HEAD: t[EMBED].clone()}),
        lambda t: t.update({HEAD: other(t[EMBED])}),
    ],
    ids=["embedding only", "head only", "both equal", "both, different"],
)
def test_tied_weights_under_either_name(change: Callable[[Tensors], object], root: Path) -> None:
    edit(root, change)
    assert_equal(read(root), as_transformers_reads(root))


def test_tied_weights_under_no_name(root: Path) -> None:
    edit(root, lambda t: t.pop(EMBED))
    refused(root, "is missing")


def rename(to: Callable[[str], str]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[to(name)] = tensors.pop(name)

    return apply


@pytest.mark.parametrize("to", [lambda n: n.removeprefix("model."), lambda n: f"model.{n}"], ids=["missing", "extra"])
def test_the_base_models_prefix_as_transformers_reads_it(to: Callable[[str], str], root: Path) -> None:
    edit(root, rename(to))
    assert_equal(read(root), as_transformers_reads(root))
    assert load_model(Checkpoint(root))[1].wrapper == ""


@pytest.mark.parametrize(
    ("to", "wrapper"),
    [
        (lambda n: f"base_model.model.{n}", "base_model."),  # transformers takes away the rest
        (lambda n: f"_orig_mod.{n}", "_orig_mod"),
        (lambda n: f"module.{n}", "module."),
        (lambda n: f"module._orig_mod.{n}", "_orig_mod, module."),
        (lambda n: f"some.other.wrapper.{n}", "some.other.wrapper."),
        (lambda n: n.replace(".self_attn.", "._orig_mod.self_attn."), "_orig_mod"),
        (lambda n: n.replace("input_layernorm", "_fsdp_wrapped_module.input_layernorm"), "_fsdp_wrapped_module"),
    ],
)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_wrappers_names_are_taken_away(
    model_type: str, to: Callable[[str], str], wrapper: str, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    root = Path(shutil.copytree(tiny_checkpoint(model_type), tmp_path / "checkpoint"))
    edit(root, rename(to))
    _, weights, _ = load_model(Checkpoint(root))
    assert weights.wrapper == wrapper
    assert_equal(read(root), read(tiny_checkpoint(model_type)))


def test_a_prefix_that_does_not_fit_is_named(root: Path) -> None:
    edit(root, lambda t: (t.update(extra=torch.ones(2)), rename(lambda n: f"tower.{n}")(t)))
    refused(root, "begin with 'tower.'")


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny.save_checkpoint(tmp_path / "sharded", tiny.make_model("qwen3_moe"), max_shard_size="100KB")


def shards(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("model-*.safetensors"))


def edit_index(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((root / INDEX).read_text())
    change(index)
    (root / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "change",
    [
        lambda i: i["weight_map"].pop(Q),
        lambda i: i["weight_map"].update({Q: i["weight_map"]["model.norm.weight"]}),
        lambda i: i["weight_map"].update({"model.layers.0.rotary_emb.inv_freq": i["weight_map"][Q]}),
    ],
    ids=["lacks a tensor", "names another shard", "names a tensor that is nowhere"],
)
def test_an_odd_index_as_transformers_reads_it(change: Callable[[dict[str, Any]], object], sharded: Path) -> None:
    edit_index(sharded, change)
    assert_equal(read(sharded), as_transformers_reads(sharded))


def test_of_two_tensors_of_one_name_the_last_counts(sharded: Path) -> None:
    first, last = shards(sharded)[0], shards(sharded)[-1]
    for name, value in ((first, 1.0), (last, 2.0)):
        save_file({**load_file(sharded / name), "model.norm.weight": torch.full((64,), value)}, sharded / name)
    assert_equal(read(sharded), as_transformers_reads(sharded))
    assert read(sharded)["model.norm.weight"][0] == 2


def test_a_stale_index_beside_a_whole_model(root: Path) -> None:
    (root / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {Q: "model-00001-of-00002.safetensors"}}))
    assert_equal(read(root), as_transformers_reads(root))


def test_another_file_that_config_json_names(root: Path) -> None:
    (root / SINGLE).rename(root / "weights.safetensors")
    edit_config = json.loads((root / "config.json").read_text()) | {"transformers_weights": "weights.safetensors"}
    (root / "config.json").write_text(json.dumps(edit_config))
    assert_equal(read(root), as_transformers_reads(root))
    (root / "config.json").write_text(json.dumps({**edit_config, "transformers_weights": "../weights.safetensors"}))
    refused(root, "transformers_weights")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda r: (r / shards(r)[1]).unlink(), ("which is missing (1 of",)),
        (lambda r: (r / shards(r)[1]).rename(r / "other.safetensors"), ("other.safetensors is there",)),
        (lambda r: (r / INDEX).unlink(), (f"no {INDEX}", f"Download {INDEX}")),
        (lambda r: (r / shards(r)[1]).write_text(POINTER), ("Git LFS pointer", "git lfs pull")),
        (lambda r: (r / INDEX).write_text(POINTER), ("Git LFS pointer", INDEX)),
        (lambda r: (r / INDEX).write_text("[" * 100_000), ("cannot be read",)),
        (lambda r: (r / INDEX).write_text("[]"), ("no JSON object, but list",)),
        (lambda r: (r / INDEX).write_bytes(b"\xff\xfe"), ("cannot be read",)),
        (lambda r: edit_index(r, lambda i: i.update(weight_map=[])), ("no weight_map",)),
        (lambda r: edit_index(r, lambda i: i["weight_map"].update({Q: {}})), ("outside the directory",)),
        (lambda r: edit_index(r, lambda i: i["weight_map"].pop("model.norm.weight")) or
         save_file({"x": torch.ones(1)}, r / shards(r)[-1]), ("is missing",)),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read_are_named(
    damage: Callable[[Path], object], words: tuple[str, ...], sharded: Path
) -> None:
    damage(sharded)
    refused(sharded, *words)


def test_variants_are_not_taken_for_the_model(root: Path) -> None:
    (root / SINGLE).rename(root / "model.fp16.safetensors")
    refused(root, "model.fp16.safetensors", f"rename it to {SINGLE}")


# -- whatever else -----------------------------------------------------------------------------------------------------

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool]


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_change_is_read_as_transformers_reads_it_or_refused(
    data: st.DataObject, tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Dtypes, names and shapes changed at random: the same weights, or one line and exit code 3."""
    source = tiny_checkpoint("qwen3_moe")
    root = tmp_path_factory.mktemp("changed")
    for path in source.iterdir():
        os.link(path, root / path.name)
    tensors = load_file(source / SINGLE)
    plain = True
    for _ in range(data.draw(st.integers(1, 4))):
        name = data.draw(st.sampled_from(sorted(tensors)))
        action = data.draw(st.sampled_from(["dtype", "name", "shape", "drop", "copy"]))
        if action == "dtype":
            tensors[name] = tensors[name].to(data.draw(st.sampled_from(DTYPES)))
        elif action == "name":
            tensors[data.draw(st.sampled_from(["x", f"model.{name}", f"{name}_scale", "é\u202e"]))] = tensors.pop(name)
        elif action == "shape":
            tensors[name] = tensors[name].reshape(-1, 2).contiguous()
        elif action == "drop":
            del tensors[name]
        else:
            tensors[f"{name}.copy"] = tensors[name].clone()
        plain = plain and not any(t.dtype == torch.float8_e4m3fn for t in tensors.values())
    (root / SINGLE).unlink()
    save_file(tensors, root / SINGLE)
    try:
        found, error = read(root), None
    except PocketMoEError as raised:
        found, error = {}, raised
    if error is not None:
        assert error.exit_code == 3
        assert "\n" not in error.one_line()
    elif plain:
        assert_equal(found, as_transformers_reads(root))


def test_a_hostile_header_is_one_line(root: Path) -> None:
    whole = (root / SINGLE).read_bytes()
    n = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + n]
    for new in (
        b"",
        header.replace(b'"F32"', b'"F99"', 1),
        header.replace(b"[0,", b"[-1,", 1),
        header.replace(b"data_offsets", b"offsets", 1),
        b"[" * 50_000,
        b'{"a":' * 50_000,
        header[:-1] + b"," + header[1:],
    ):
        (root / SINGLE).write_bytes(len(new).to_bytes(8, "little") + new + whole[8 + n :])
        refused(root, SINGLE, "not a whole safetensors file", kind=DamagedFile)
