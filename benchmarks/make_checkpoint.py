"""Writes a checkpoint with random weights in a real model's shape, shard by shard, in bounded memory.

    python benchmarks/make_checkpoint.py olmoe-1b-7b -o DIR [--layers N] [--experts E] [--seed S] [--dtype fp8]

Shapes: olmoe-1b-7b (hidden 2048, 64 experts top-8, ffn 1024, 16 layers, vocabulary 50304; 14 GB in bf16),
qwen3-30b-a3b (hidden 2048, 128 experts top-8, ffn 768, 48 layers, vocabulary 151936) and gpt-oss-20b (hidden 2880, 32
experts top-4, ffn 2880, 24 layers, vocabulary 201088; 13 GB, its experts in MXFP4 as they are published; with 128
experts and 36 layers it is gpt-oss-120b); narrow (two layers with experts as small as Qwen3-Next's: hidden 2048, ffn
512, vocabulary 4096). Other numbers of experts keep the active parameters.
Speed, memory and paging do not depend on what the weights are; routing does: random routers choose nearly uniformly,
the worst case for any cache. routing.py makes some tokens route like a real model.

fp8 is the form in which Qwen publishes the large ones: e4m3 with a scale for each 128 x 128, but for routers, norms,
embedding and head; half the bytes (qwen3-30b-a3b: 30 GB). Its values are slices of one pool of random ones, each
from a place of its own, since drawing 30 billion normal numbers takes longer than quantizing them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SHAPES: dict[str, dict] = {
    "olmoe-1b-7b": {
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 8, "vocab_size": 50304, "max_position_embeddings": 4096, "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5, "norm_topk_prob": False, "tie_word_embeddings": False, "eos_token_id": 50279,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936,
        "max_position_embeddings": 4096, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "norm_topk_prob": True,
        "tie_word_embeddings": False, "eos_token_id": 151645,
    },
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "num_local_experts": 32, "num_experts_per_tok": 4, "vocab_size": 201088, "max_position_embeddings": 131072,
        "rope_theta": 150000, "rms_norm_eps": 1e-5, "sliding_window": 128, "attention_bias": True,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "tie_word_embeddings": False, "eos_token_id": 200002,
    },
}  # fmt: skip
SHAPES["narrow"] = SHAPES["olmoe-1b-7b"] | {"intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 4096}
SHAPES["narrow"]["eos_token_id"] = 4095


BLOCK = 128  # rows and columns that share a scale in fp8
_POOL = 1 << 26


class Fp8:
    """Random weights as e4m3 and float32 [ceil(rows / 128), ceil(columns / 128)] of scales."""

    settings: ClassVar = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        values = torch.randn(_POOL, generator=generator) * 100  # of the 448 that e4m3 has
        self._pool = values.clamp(-448, 448).to(torch.float8_e4m3fn)

    def weight(self, name: str, rows: int, columns: int, scale: float) -> Iterator[tuple[str, torch.Tensor]]:
        start = int(torch.randint(_POOL - rows * columns, (), generator=self._generator))
        yield f"{name}.weight", self._pool[start : start + rows * columns].reshape(rows, columns).clone()
        blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
        spread = 0.9 + 0.2 * torch.rand(blocks, generator=self._generator)
        yield f"{name}.weight_scale_inv", spread * (scale / 100)


def tensors(
    config: dict, layer: int, generator: torch.Generator, fp8: Fp8 | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one layer under their checkpoint names, bf16, or with `fp8` as that says."""
    hidden, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim", hidden // heads)
    ffn = config.get("moe_intermediate_size", config["intermediate_size"])
    prefix = f"model.layers.{layer}."

    def weight(name: str, rows: int, columns: int, *, router: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        scale = 0.6 / columns**0.5
        if fp8 and not router:
            yield from fp8.weight(prefix + name, rows, columns, scale)
            return
        values = torch.randn(rows, columns, generator=generator) * scale
        yield prefix + name + ".weight", values.to(torch.bfloat16)

    yield from weight("self_attn.q_proj", heads * head, hidden)
    yield from weight("self_attn.k_proj", kv_heads * head, hidden)
    yield from weight("self_attn.v_proj", kv_heads * head, hidden)
    yield from weight("self_attn.o_proj", hidden, heads * head)
    yield from weight("mlp.gate", config["num_experts"], hidden, router=True)
    for expert in range(config["num_experts"]):
        yield from weight(f"mlp.experts.{expert}.gate_proj", ffn, hidden)
        yield from weight(f"mlp.experts.{expert}.up_proj", ffn, hidden)
        yield from weight(f"mlp.experts.{expert}.down_proj", hidden, ffn)
    per_head = config["model_type"] == "qwen3_moe"
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    norms |= {"self_attn.q_norm": head if per_head else heads * head}
    norms |= {"self_attn.k_norm": head if per_head else kv_heads * head}
    for name, size in norms.items():
        yield prefix + name + ".weight", torch.ones(size, dtype=torch.bfloat16)


class Mxfp4:
    """Random weights of experts as gpt-oss has them: two codes of e2m1 a byte, a power of two for each 32 of a row."""

    settings: ClassVar = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
        ],
    }  # fmt: skip
    POOL: ClassVar = 1 << 29  # bytes
    _SPREAD = 2.93  # of codes that are drawn evenly

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._pool = torch.randint(256, (self.POOL,), dtype=torch.uint8, generator=generator)

    def weight(self, name: str, shape: tuple[int, int, int], scale: float) -> Iterator[tuple[str, torch.Tensor]]:
        """`shape`: experts, outputs, inputs."""
        experts, rows, columns = shape
        nbytes = rows * columns // 2
        starts = torch.randint(self.POOL - nbytes, (experts,), generator=self._generator).tolist()
        blocks = torch.stack([self._pool[start : start + nbytes] for start in starts])
        yield f"{name}_blocks", blocks.reshape(experts, rows, columns // 32, 16)
        exponent = 127 + round(math.log2(scale / self._SPREAD))
        scales = torch.randint(exponent - 1, exponent + 2, (experts, rows, columns // 32), generator=self._generator)
        yield f"{name}_scales", scales.to(torch.uint8)


def gpt_oss_tensors(
    config: dict, layer: int, generator: torch.Generator, mxfp4: Mxfp4
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one layer of a gpt-oss under their checkpoint names: experts in MXFP4, all else bf16."""
    hidden, ffn, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    heads, kv_heads = (config[f"num_{what}_heads"] * config["head_dim"] for what in ("attention", "key_value"))
    prefix = f"model.layers.{layer}."
    linear = {"self_attn.q_proj": (heads, hidden), "self_attn.k_proj": (kv_heads, hidden)}
    linear |= {"self_attn.v_proj": (kv_heads, hidden), "self_attn.o_proj": (hidden, heads)}
    linear |= {"mlp.router": (experts, hidden)}
    for name, (rows, columns) in linear.items():
        values = torch.randn(rows, columns, generator=generator) * (0.6 / columns**0.5)
        yield f"{prefix}{name}.weight", values.to(torch.bfloat16)
        yield f"{prefix}{name}.bias", (torch.randn(rows, generator=generator) * 0.02).to(torch.bfloat16)
    yield f"{prefix}self_attn.sinks", torch.randn(config["num_attention_heads"], generator=generator).to(torch.bfloat16)
    for name, rows, columns in (("gate_up_proj", 2 * ffn, hidden), ("down_proj", hidden, ffn)):
        yield from mxfp4.weight(f"{prefix}mlp.experts.{name}", (experts, rows, columns), 0.6 / columns**0.5)
        bias = torch.randn(experts, rows, generator=generator) * 0.02
        yield f"{prefix}mlp.experts.{name}_bias", bias.to(torch.bfloat16)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}{name}.weight", torch.ones(hidden, dtype=torch.bfloat16)


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """A byte-level tokenizer whose other ids are words of their own number."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate(alphabet)}
    vocab |= {f"<{number}>": number for number in range(len(alphabet), vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--experts", type=int, help="at constant active parameters; default: the shape's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("bf16", "fp8"), default="bf16")
    args = parser.parse_args()
    config = dict(SHAPES[args.shape])
    config["num_hidden_layers"] = args.layers or config["num_hidden_layers"]
    named = "num_local_experts" if config["model_type"] == "gpt_oss" else "num_experts"
    config[named] = args.experts or config[named]
    config["torch_dtype"] = "bfloat16"
    args.output.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(args.seed)
    fp8 = Fp8(generator) if args.dtype == "fp8" else None
    mxfp4 = Mxfp4(generator) if config["model_type"] == "gpt_oss" else None
    if mxfp4:
        config["quantization_config"] = mxfp4.settings
    elif fp8:
        config["quantization_config"] = fp8.settings | {"weight_block_size": [BLOCK, BLOCK]}
    layers, weight_map, total = config["num_hidden_layers"], {}, 0
    for shard in range(layers + 1):
        if shard < layers:
            of = gpt_oss_tensors(config, shard, generator, mxfp4) if mxfp4 else tensors(config, shard, generator, fp8)
            content = dict(of)
        else:
            table = (config["vocab_size"], config["hidden_size"])
            content = {
                "model.embed_tokens.weight": torch.randn(table, generator=generator).to(torch.bfloat16),
                "lm_head.weight": (torch.randn(table, generator=generator) * 0.02).to(torch.bfloat16),
                "model.norm.weight": torch.ones(config["hidden_size"], dtype=torch.bfloat16),
            }
        name = f"model-{shard + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(content, args.output / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(content, name)
        total += sum(tensor.nbytes for tensor in content.values())
        print(f"{name}: {len(content)} tensors, {total / 1e9:.1f} GB so far", flush=True)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (args.output / "model.safetensors.index.json").write_text(json.dumps(index))
    (args.output / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(args.output, config["vocab_size"])


if __name__ == "__main__":
    main()
