"""Writes a checkpoint with random weights in a real model's shape, shard by shard, in bounded memory.

    python benchmarks/make_checkpoint.py olmoe-1b-7b -o DIR [--layers N] [--experts E] [--seed S]

Shapes: olmoe-1b-7b (hidden 2048, 64 experts top-8, ffn 1024, 16 layers, vocabulary 50304; 14 GB in bf16) and
qwen3-30b-a3b (hidden 2048, 128 experts top-8, ffn 768, 48 layers, vocabulary 151936); narrow (two layers with experts
as small as Qwen3-Next's: hidden 2048, ffn 512, vocabulary 4096). Other numbers of experts keep the active parameters.
Speed, memory and paging do not depend on what the weights are; routing does: random routers choose nearly uniformly,
the worst case for any cache. routing.py makes some tokens route like a real model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

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
}  # fmt: skip
SHAPES["narrow"] = SHAPES["olmoe-1b-7b"] | {"intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 4096}
SHAPES["narrow"]["eos_token_id"] = 4095


def tensors(config: dict, layer: int, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one layer under their checkpoint names, bf16."""
    hidden, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim", hidden // heads)
    ffn = config.get("moe_intermediate_size", config["intermediate_size"])
    prefix = f"model.layers.{layer}."

    def weight(name: str, rows: int, columns: int) -> tuple[str, torch.Tensor]:
        values = torch.randn(rows, columns, generator=generator) * (0.6 / columns**0.5)
        return prefix + name + ".weight", values.to(torch.bfloat16)

    yield weight("self_attn.q_proj", heads * head, hidden)
    yield weight("self_attn.k_proj", kv_heads * head, hidden)
    yield weight("self_attn.v_proj", kv_heads * head, hidden)
    yield weight("self_attn.o_proj", hidden, heads * head)
    yield weight("mlp.gate", config["num_experts"], hidden)
    for expert in range(config["num_experts"]):
        yield weight(f"mlp.experts.{expert}.gate_proj", ffn, hidden)
        yield weight(f"mlp.experts.{expert}.up_proj", ffn, hidden)
        yield weight(f"mlp.experts.{expert}.down_proj", hidden, ffn)
    per_head = config["model_type"] == "qwen3_moe"
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    norms |= {"self_attn.q_norm": head if per_head else heads * head}
    norms |= {"self_attn.k_norm": head if per_head else kv_heads * head}
    for name, size in norms.items():
        yield prefix + name + ".weight", torch.ones(size, dtype=torch.bfloat16)


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
    args = parser.parse_args()
    config = dict(SHAPES[args.shape])
    config["num_hidden_layers"] = args.layers or config["num_hidden_layers"]
    config["num_experts"] = args.experts or config["num_experts"]
    config["torch_dtype"] = "bfloat16"
    args.output.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(args.seed)
    layers, weight_map, total = config["num_hidden_layers"], {}, 0
    for shard in range(layers + 1):
        if shard < layers:
            content = dict(tensors(config, shard, generator))
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
