"""A checkpoint of make_checkpoint.py as llama.cpp's file: its own weights in Q4_0, routers and norms in fp32.

python benchmarks/gguf_file.py CHECKPOINT        writes CHECKPOINT/q4_0.gguf; needs `pip install gguf`
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
from safetensors import safe_open

Q4_0 = gguf.GGMLQuantizationType.Q4_0
NAME = "q4_0.gguf"


class Tensor(NamedTuple):
    """A tensor to be: its shape, and what reads it, so that only one is in memory at a time."""

    name: str
    shape: tuple[int, ...]
    quantized: bool
    read: Callable[[], np.ndarray]


class Checkpoint:
    """Tensors of a directory with safetensors by name, float32."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = json.loads((directory / "config.json").read_text())
        self._index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self.directory / self._index[name], "pt") as shard:
            return tuple(shard.get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        with safe_open(self.directory / self._index[name], "pt") as shard:
            return shard.get_tensor(name).float().numpy()


def tensors(checkpoint: Checkpoint) -> Iterator[Tensor]:
    """All tensors under llama.cpp's names, in the order of the layers."""

    def plain(theirs: str, ours: str, quantized: bool = True) -> Tensor:
        ours += ".weight"
        return Tensor(f"{theirs}.weight", checkpoint.shape(ours), quantized, partial(checkpoint.read, ours))

    def stacked(theirs: str, ours: list[str]) -> Tensor:
        shape = (len(ours), *checkpoint.shape(ours[0]))
        return Tensor(theirs, shape, True, lambda: np.stack([checkpoint.read(name) for name in ours]))

    yield plain("token_embd", "model.embed_tokens")
    yield plain("output", "lm_head")
    yield plain("output_norm", "model.norm", quantized=False)
    for layer in range(checkpoint.config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        for short, name in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("output", "o_proj")):
            yield plain(f"{theirs}attn_{short}", f"{ours}self_attn.{name}")
        norms = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
        norms |= {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate_inp": "mlp.gate"}
        for short, name in norms.items():
            yield plain(f"{theirs}{short}", f"{ours}{name}", quantized=False)
        for part in ("gate", "up", "down"):
            experts = range(checkpoint.config["num_experts"])
            names = [f"{ours}mlp.experts.{expert}.{part}_proj.weight" for expert in experts]
            yield stacked(f"{theirs}ffn_{part}_exps.weight", names)


def write_gguf(directory: Path) -> Path:
    """Write the file, once; it appears under its name when it is whole."""
    target = directory / NAME
    if target.exists():
        return target
    checkpoint = Checkpoint(directory)
    beside = target.with_suffix(".partial")
    writer = gguf.GGUFWriter(beside, _architecture(checkpoint.config))
    _describe(writer, checkpoint.config)
    plan = list(tensors(checkpoint))
    for tensor in plan:
        if tensor.quantized:
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, Q4_0)
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), int(np.prod(shape)), Q4_0)
        else:
            nbytes = 4 * int(np.prod(tensor.shape))
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in plan:
        weight = tensor.read()
        writer.write_tensor_data(gguf.quants.quantize(weight, Q4_0) if tensor.quantized else weight)
    writer.close()
    with open(beside, "rb") as file:
        os.fsync(file.fileno())
    return beside.replace(target)


def _architecture(config: dict) -> str:
    return {"olmoe": "olmoe", "qwen3_moe": "qwen3moe"}[config["model_type"]]


def _describe(writer: gguf.GGUFWriter, config: dict) -> None:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config.get("head_dim", hidden // heads))
    writer.add_value_length(config.get("head_dim", hidden // heads))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(2)
    words = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    words += [f"w{number}" for number in range(config["vocab_size"] - len(words))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(words) - 259))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    print(write_gguf(parser.parse_args().checkpoint))


if __name__ == "__main__":
    main()
