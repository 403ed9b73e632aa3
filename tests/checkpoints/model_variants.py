"""Weights, settings, positions, adapters and sizes as published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.checkpoints.variant import Variant, checkpoint, edit_json, edit_tensors

_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 123456\n"
_QWEN: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 4,
    "moe_intermediate_size": 16,
    "head_dim": 16,
    "intermediate_size": 16,
    "tie_word_embeddings": False,
}
Build = Callable[[Path, Path], None]


def _qwen(directory: Path) -> None:
    checkpoint(directory, "qwen3_moe", **_QWEN)


def _with(edit: Callable[[dict[str, Any]], object], truth_too: bool = True, **settings: Any) -> Build:
    """A checkpoint with changed tensors and settings. Its truth: itself, or the plain one (`truth_too` false)."""

    def build(directory: Path, truth: Path) -> None:
        _qwen(directory)
        if not truth_too:
            shutil.copytree(directory, truth)
        edit_tensors(directory, edit)
        edit_json(directory / "config.json", **settings)

    return build


def _file(name: str, text: str | None, build: Callable[[Path], None] = _qwen) -> Build:
    def make(directory: Path, truth: Path) -> None:
        build(directory)
        shutil.copytree(directory, truth)
        (directory / name).unlink(missing_ok=True) if text is None else (directory / name).write_text(text)

    return make


def _dtypes(*names: str) -> Build:
    def edit(tensors: dict[str, Any]) -> None:
        import torch

        for n, key in enumerate(sorted(tensors)):
            tensors[key] = tensors[key].to(getattr(torch, names[n % len(names)]))

    return _with(edit)


def _fp8(scale: str, config: dict[str, Any], suffix: str = "weight_scale") -> Build:
    """Matrices in float8_e4m3fn with scales that are powers of two, so that transformers reads the exact product."""

    def build(directory: Path, truth: Path) -> None:
        import torch

        _qwen(directory)
        stored: dict[str, Any] = {}

        def exact(tensors: dict[str, Any]) -> None:
            for n, key in enumerate(sorted(k for k in tensors if "_proj.weight" in k)):
                factor = _factors(scale, tensors[key], n)
                grid = (tensors[key] / _spread(factor, tensors[key])).to(torch.float8_e4m3fn)
                stored[key], stored[key.replace("weight", suffix)] = grid, factor
                tensors[key] = grid.float() * _spread(factor, tensors[key])

        edit_tensors(directory, exact)
        shutil.copytree(directory, truth)
        edit_tensors(directory, lambda tensors: tensors.update(stored))
        edit_json(directory / "config.json", quantization_config=config)

    return build


def _factors(scale: str, weight: Any, seed: int) -> Any:
    import torch

    rows, columns = weight.shape
    shape = {
        "tensor": (),
        "one": (1,),
        "row": (rows, 1),
        "flat row": (rows,),
        "block": (-(-rows // 16), -(-columns // 16)),
    }[scale]
    generator = torch.Generator().manual_seed(seed)
    return 2.0 ** torch.randint(-4, -1, shape, generator=generator).float()


def _spread(factor: Any, weight: Any) -> Any:
    if factor.ndim == 2 and factor.shape != (weight.shape[0], 1):
        return factor.repeat_interleave(16, 0)[: weight.shape[0]].repeat_interleave(16, 1)[:, : weight.shape[1]]
    return factor.reshape(-1, 1) if factor.ndim == 1 and factor.numel() > 1 else factor


def _compressed(strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **more}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": groups,
    }


def _as_int(part: str, dtype: str, scales: bool = False) -> Callable[[dict[str, Any]], object]:
    def edit(tensors: dict[str, Any]) -> None:
        import torch

        for key in [key for key in tensors if part in key]:
            if scales:
                tensors[key + "_scale"] = torch.ones(tensors[key].shape[0], 1)
            tensors[key] = (tensors[key] * 100).to(getattr(torch, dtype))

    return edit


def _renamed(old: str, new: str) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: [tensors.__setitem__(k.replace(old, new, 1), tensors.pop(k)) for k in list(tensors)]


def _halved(tensors: dict[str, Any]) -> None:
    """Two four-bit floats in a byte, as NVFP4 has them."""
    import torch

    for key in [key for key in tensors if "_proj.weight" in key]:
        rows, columns = tensors[key].shape
        tensors[key] = torch.zeros(rows, columns // 2, dtype=torch.uint8)
        tensors[key + "_scale"] = torch.ones(rows, max(columns // 16, 1)).to(torch.float8_e4m3fn)


def _shards(change: Callable[[Path, dict[str, Any]], object] | None = None) -> Build:
    """Several shards with an index, which is changed."""

    def build(directory: Path, truth: Path) -> None:
        from tests import tiny

        tiny.save_checkpoint(directory, tiny.make_model("qwen3_moe", **_QWEN), max_shard_size="20KB")
        shutil.copytree(directory, truth)
        path = directory / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        if change is not None:
            change(directory, index)
            if path.exists():
                path.write_text(json.dumps(index))

    return build


def _index_pointer(directory: Path, truth: Path) -> None:
    _shards()(directory, truth)
    (directory / "model.safetensors.index.json").write_text(_POINTER)


def _first_shard(directory: Path) -> Path:
    return min(directory.glob("model-*.safetensors"))


def _extra(tensors: dict[str, Any]) -> None:
    import torch

    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["v_head.summary.weight"] = torch.ones(1, 32)
    tensors["model.layers.1.mlp.gate.weight"] = torch.ones(4, 4)


def _tied(kept: str, lost: str) -> Build:
    """Tied weights, saved under one of their two names."""

    def build(directory: Path, _truth: Path) -> None:
        checkpoint(directory, "qwen3_moe", **{**_QWEN, "tie_word_embeddings": True})

        def edit(tensors: dict[str, Any]) -> None:
            found = tensors.pop(lost, None)
            tensors.setdefault(kept, found)

        edit_tensors(directory, edit)

    return build


def _bnb(part: str | None = None) -> Build:
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    changes = {"quantization_config": config} if part is None else {part: {"quantization_config": config}}
    return _with(lambda _: None, truth_too=False, **changes)


def weights() -> list[Variant]:
    block = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    modelopt = {"quant_method": "modelopt", "quant_algo": "FP8", "producer": {"name": "modelopt"}}
    same: list[tuple[str, str, Build]] = [
        ("dtypes", "bfloat16", _dtypes("bfloat16")),
        ("dtypes", "float16", _dtypes("float16")),
        (
            "dtypes",
            "float64, float32, float16 and bfloat16 mixed",
            _dtypes("bfloat16", "float16", "float32", "float64"),
        ),
        ("files", "shards with an index", _shards()),
        ("files", "an index with a wrong total_size", _shards(lambda _d, i: i["metadata"].update(total_size=5))),
        ("files", "no metadata in the shard", _with(lambda _: None)),
        ("files", "extra tensors: inv_freq, a value head, a further layer", _with(_extra, truth_too=False)),
        ("files", "tied weights under the embedding's name", _tied("model.embed_tokens.weight", "lm_head.weight")),
        ("files", "tied weights under the head's name", _tied("lm_head.weight", "model.embed_tokens.weight")),
        ("FP8", "DeepSeek's blocks (weight_scale_inv)", _fp8("block", block, "weight_scale_inv")),
        ("FP8", "compressed-tensors, per tensor", _fp8("one", _compressed("tensor"))),
        ("FP8", "compressed-tensors, per channel", _fp8("row", _compressed("channel"))),
        ("FP8", "compressed-tensors, blocks", _fp8("block", _compressed("block", block_structure=[16, 16]))),
        ("FP8", "fbgemm_fp8, per row", _fp8("row", {"quant_method": "fbgemm_fp8"})),
        ("FP8", "modelopt, per tensor", _fp8("tensor", modelopt)),
        ("leftovers of quantizing", "bitsandbytes in config.json, plain tensors", _bnb()),
    ]
    no_index = lambda d, _i: (d / "model.safetensors.index.json").unlink()  # noqa: E731
    bits = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    packed = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    refused: list[tuple[str, str, Build, str]] = [
        (
            "refused methods",
            "GPTQ",
            _with(_renamed("q_proj.weight", "q_proj.qweight"), quantization_config=bits),
            "gptq",
        ),
        (
            "refused methods",
            "AWQ",
            _with(_renamed("q_proj.weight", "q_proj.qweight"), quantization_config={"quant_method": "awq"}),
            "awq",
        ),
        (
            "refused methods",
            "compressed-tensors, packed",
            _with(_renamed("q_proj.weight", "q_proj.weight_packed"), quantization_config=packed),
            "pack|compressed-tensors",
        ),
        (
            "refused methods",
            "compression_config, the older name",
            _with(_renamed("q_proj.weight", "q_proj.weight_packed"), compression_config=packed),
            "pack|compressed-tensors",
        ),
        (
            "refused methods",
            "NVFP4 by modelopt",
            _with(_halved, quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"}),
            "nvfp4|uint8|u8",
        ),
        ("refused methods", "NVFP4, config.json silent", _with(_halved), "uint8|u8"),
        (
            "refused dtypes",
            "int8 projections with scales, config.json silent",
            _with(_as_int("_proj.weight", "int8", scales=True)),
            "int8|i8",
        ),
        ("refused dtypes", "one expert in int8", _with(_as_int("experts.3.", "int8")), "int8|i8"),
        ("refused dtypes", "the embedding in int8", _with(_as_int("embed_tokens", "int8")), "int8|i8"),
        ("refused dtypes", "a norm in int32", _with(_as_int("input_layernorm", "int32")), "int32|i32"),
        ("refused dtypes", "float8 without scales", _with(_as_int("experts", "float8_e4m3fn")), "f8_e4m3|float8"),
        ("Git LFS", "the shard is a pointer", _file("model.safetensors", _POINTER), "lfs"),
        ("Git LFS", "tokenizer.json is a pointer", _file("tokenizer.json", _POINTER), "lfs"),
        ("Git LFS", "config.json is a pointer", _file("config.json", _POINTER), "lfs"),
        ("Git LFS", "the index is a pointer", _index_pointer, "lfs"),
        ("files", "no shard", _file("model.safetensors", None), "safetensors"),
        ("files", "a shard of several is missing", _shards(lambda d, _i: _first_shard(d).unlink()), "model-"),
        (
            "files",
            "a shard cut short",
            _shards(lambda d, _i: _first_shard(d).write_bytes(_first_shard(d).read_bytes()[:-100])),
            "model-",
        ),
    ]
    either: list[tuple[str, str, Build, str]] = [
        (
            "files",
            "an index that names a tensor the shard lacks",
            _shards(lambda _d, i: i["weight_map"].update({"model.norm.weight": min(i["weight_map"].values())})),
            "norm|index",
        ),
        ("files", "shards without an index", _shards(no_index), "index"),
        *(
            (
                "wrappers",
                f"every name begins with {prefix}",
                _with(_renamed("", prefix), truth_too=False),
                prefix.strip("_.").split(".")[0],
            )
            for prefix in ("base_model.model.", "_orig_mod.", "module.")
        ),
        (
            "wrappers",
            "an adapter's base_layer",
            _with(_renamed("q_proj.weight", "q_proj.base_layer.weight"), truth_too=False),
            "adapter|base_layer|merge",
        ),
    ]
    return [
        *(Variant(kind, example, build) for kind, example, build in same),
        *(Variant(kind, example, build, refused=words) for kind, example, build, words in refused),
        *(Variant(kind, example, build, refused=words, or_tokens=True) for kind, example, build, words in either),
    ]


_FAMILIES = ("olmoe", "qwen3_moe", "qwen2_moe", "mixtral", "granitemoe", "phimoe", "gpt_oss", "deepseek_v3")
_HARMLESS: dict[str, Any] = {
    "use_cache": False,
    "output_router_logits": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "return_dict": False,
    "attention_dropout": 0.3,
    "gradient_checkpointing": True,
    "dtype": "float16",
    "torch_dtype": "bfloat16",
    "_attn_implementation": "flash_attention_2",
    "initializer_range": float("inf"),
}


def _settings(family: str, changes: dict[str, Any], drop: Sequence[str] = (), generation: Any = ...) -> Build:
    """A checkpoint with settings in config.json; the truth is the plain one where transformers' answer is the same."""

    def build(directory: Path, truth: Path) -> None:
        sizes = {"olmoe": {"num_hidden_layers": 2}}.get(family, _QWEN if family == "qwen3_moe" else {})
        checkpoint(directory, family, **sizes)
        if generation is ...:
            shutil.copytree(directory, truth)
        edit_json(directory / "config.json", tuple(drop), **changes)
        if generation is None:
            (directory / "generation_config.json").unlink()
        elif generation is not ...:
            (directory / "generation_config.json").write_text(json.dumps(generation))

    return build


def settings() -> list[Variant]:
    stops = [*range(3, 60)]
    alone = {name: {name: value} for name, value in _HARMLESS.items()}
    alone |= {
        "NaN": {"initializer_range": float("nan")},
        "null pad_token_id": {"pad_token_id": None},
        "pad_token_id -1": {"pad_token_id": -1},
    }
    return [
        *(
            Variant("config.json of training", f"{name} (mixtral)", _settings("mixtral", change))
            for name, change in alone.items()
        ),
        *(
            Variant("config.json of training", f"all of these at once ({family})", _settings(family, _HARMLESS))
            for family in _FAMILIES
        ),
        Variant(
            "config.json of training",
            "pad_token_id beyond the embedding",
            _settings("mixtral", {"pad_token_id": 512}),
            refused="pad_token_id",
            or_tokens=True,
        ),
        Variant(
            "config.json of training",
            "no architectures, torch_dtype, rope_scaling null (older transformers)",
            _settings(
                "mixtral",
                {"torch_dtype": "float32", "rope_scaling": None, "transformers_version": "4.36.0"},
                drop=("architectures",),
            ),
        ),
        Variant(
            "config.json of training",
            "another head in architectures",
            _settings("mixtral", {"architectures": ["MixtralForSequenceClassification"]}),
            refused="architectures|forsequence",
            or_tokens=True,
        ),
        Variant(
            "ends of text",
            "a list in generation_config.json only",
            _settings("mixtral", {}, generation={"eos_token_id": [1, *stops]}),
            tokens=60,
        ),
        Variant(
            "ends of text",
            "a list in config.json, no generation_config.json",
            _settings("mixtral", {"eos_token_id": [1, *stops]}, generation=None),
            tokens=60,
        ),
        Variant(
            "ends of text",
            "generation_config.json and config.json differ",
            _settings("mixtral", {"eos_token_id": 7}, generation={"eos_token_id": stops}),
            tokens=60,
        ),
        Variant("ends of text", "none at all", _settings("mixtral", {"eos_token_id": None}, generation={}), tokens=40),
    ]


def _longrope(family: str) -> Build:
    half = 8
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "short_factor": [1 + n / 10 for n in range(half)],
        "long_factor": [4 + 2 * n for n in range(half)],
        "original_max_position_embeddings": 200,
    }
    extra = {"short_mscale": 1.1, "long_mscale": 1.3} if family == "phimoe" else {}
    sizes = {**_QWEN} if family == "qwen3_moe" else {}
    changes = {**sizes, "rope_parameters": {**rope, **extra}, "max_position_embeddings": 1024}
    return lambda directory, _truth: checkpoint(directory, family, **changes)


def _adapter(directory: Path, truth: Path, where: str) -> None:
    """A LoRA adapter as peft writes it; the truth has it merged: W + B A alpha / r."""
    import torch
    from safetensors.torch import save_file

    _qwen(directory)
    shutil.copytree(directory, truth)
    name, rank, alpha = "model.layers.0.self_attn.q_proj", 4, 16
    a, b = torch.randn(rank, 32) / 8, torch.randn(32, rank) / 8
    edit_tensors(truth, lambda t: t[f"{name}.weight"].add_(b @ a * (alpha / rank)))
    target = directory if where == "beside" else directory / "adapter"
    target.mkdir(exist_ok=True)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "someone/base",
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "fan_in_fan_out": False,
        "use_rslora": False,
    }
    (target / "adapter_config.json").write_text(json.dumps(config))
    tensors = {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    save_file(tensors, target / "adapter_model.safetensors")
    if where == "alone":
        for path in directory.iterdir():
            path.unlink() if path.is_file() else None
        for path in (directory / "adapter").iterdir():
            path.rename(directory / path.name)
        (directory / "adapter").rmdir()


def _hub_cache(outside: bool) -> Build:
    """As the hub's cache has it: snapshots/REVISION of links into blobs/; one of them may lead elsewhere."""

    def build(directory: Path, truth: Path) -> None:
        _qwen(truth)
        blobs, snapshot = directory.parent / "models--a--b/blobs", directory.parent / "models--a--b/snapshots/1"
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for n, path in enumerate(sorted(truth.iterdir())):
            shutil.copyfile(path, blobs / f"{n:040x}")
            (snapshot / path.name).symlink_to(f"../../blobs/{n:040x}")
        if outside:
            shutil.copyfile(truth / "README.md", directory.parent / "secret")
            (snapshot / "README.md").unlink()
            (snapshot / "README.md").symlink_to("../../../secret")
        directory.symlink_to(snapshot)

    return build


def others() -> list[Variant]:
    return [
        *(
            Variant(
                "positions", f"longrope on both sides of its threshold ({family})", _longrope(family), measure="logits"
            )
            for family in ("phimoe", "qwen3_moe")
        ),
        Variant(
            "adapters",
            "an adapter by --adapter",
            lambda d, t: _adapter(d, t, "apart"),
            options=("--adapter", "{checkpoint}/adapter"),
        ),
        Variant(
            "adapters",
            "an adapter beside a whole model",
            lambda d, t: _adapter(d, t, "beside"),
            refused="adapter",
            or_tokens=True,
        ),
        Variant("adapters", "an adapter alone", lambda d, t: _adapter(d, t, "alone"), refused="adapter"),
        Variant("places", "a checkpoint in the hub's cache", _hub_cache(False)),
        Variant("places", "a link that leaves the hub's cache", _hub_cache(True), refused="link"),
        Variant("places", "a bundle in the hub's cache", lambda d, _t: _qwen(d), measure="bundle in hub cache"),
        Variant(
            "sizes",
            "1,280 experts, 1,024 open files",
            lambda d, _t: checkpoint(
                d,
                "olmoe",
                hidden_size=32,
                num_hidden_layers=2,
                num_experts=640,
                num_experts_per_tok=64,
                intermediate_size=8,
            ),
            tokens=60,
            measure="open files",
        ),
        Variant(
            "sizes",
            "hidden size 34, experts of 17",
            lambda d, _t: checkpoint(
                d, "mixtral", hidden_size=34, intermediate_size=17, num_attention_heads=1, num_key_value_heads=1
            ),
        ),
        Variant("sizes", "experts of one row", lambda d, _t: checkpoint(d, "mixtral", intermediate_size=1)),
        Variant(
            "sizes",
            "one expert in all, one per token",
            lambda d, _t: checkpoint(d, "mixtral", num_local_experts=1, num_experts_per_tok=1),
        ),
    ]


def variants() -> list[Variant]:
    return [*weights(), *settings(), *others()]
