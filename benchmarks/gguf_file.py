"""An OLMoE or Qwen3-MoE checkpoint as llama.cpp's file: its own weights in Q4_0 or fp32, routers and norms in fp32.

    python benchmarks/gguf_file.py CHECKPOINT [-o FILE] [--type Q4_0|F32]     needs `pip install gguf`

llama.cpp knows OLMoE only with as many heads of keys and values as of queries. One with fewer gets each of them
several times over, which changes nothing in what it computes: its norm of the keys divides by the mean square of all.
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
from make_checkpoint import BLOCK
from safetensors import safe_open

Type = gguf.GGMLQuantizationType
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
        index = directory / "model.safetensors.index.json"
        if index.exists():
            self._index = json.loads(index.read_text())["weight_map"]
        else:
            with safe_open(directory / "model.safetensors", "pt") as shard:
                self._index = dict.fromkeys(shard.keys(), "model.safetensors")

    @property
    def repeats(self) -> int:
        """How often each head of keys and values is to be written."""
        few = self.config["num_attention_heads"] // self.config["num_key_value_heads"]
        return few if self.config["model_type"] == "olmoe" else 1

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self.directory / self._index[name], "pt") as shard:
            return tuple(shard.get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        with safe_open(self.directory / self._index[name], "pt") as shard:
            weight = shard.get_tensor(name).float()
            if (scale := f"{name}_scale_inv") in self._index:
                blocks = shard.get_tensor(scale).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
                weight *= blocks[: weight.shape[0], : weight.shape[1]]
            return weight.numpy()


def tensors(checkpoint: Checkpoint) -> Iterator[Tensor]:
    """All tensors under llama.cpp's names, in the order of the layers."""

    def plain(theirs: str, ours: str, quantized: bool = True) -> Tensor:
        ours += ".weight"
        return Tensor(f"{theirs}.weight", checkpoint.shape(ours), quantized, partial(checkpoint.read, ours))

    def repeated(theirs: str, ours: str, quantized: bool = True) -> Tensor:
        tensor = plain(theirs, ours, quantized)
        shape = (tensor.shape[0] * checkpoint.repeats, *tensor.shape[1:])
        return tensor._replace(shape=shape, read=lambda: repeat_heads(tensor.read(), checkpoint))

    def stacked(theirs: str, ours: list[str]) -> Tensor:
        shape = (len(ours), *checkpoint.shape(ours[0]))
        return Tensor(theirs, shape, True, lambda: np.stack([checkpoint.read(name) for name in ours]))

    yield plain("token_embd", "model.embed_tokens")
    yield plain("output", "lm_head")
    yield plain("output_norm", "model.norm", quantized=False)
    for layer in range(checkpoint.config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        yield plain(f"{theirs}attn_q", f"{ours}self_attn.q_proj")
        yield repeated(f"{theirs}attn_k", f"{ours}self_attn.k_proj")
        yield repeated(f"{theirs}attn_v", f"{ours}self_attn.v_proj")
        yield plain(f"{theirs}attn_output", f"{ours}self_attn.o_proj")
        yield repeated(f"{theirs}attn_k_norm", f"{ours}self_attn.k_norm", quantized=False)
        norms = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
        norms |= {"attn_q_norm": "self_attn.q_norm", "ffn_gate_inp": "mlp.gate"}
        for short, name in norms.items():
            yield plain(f"{theirs}{short}", f"{ours}{name}", quantized=False)
        for part in ("gate", "up", "down"):
            experts = range(checkpoint.config["num_experts"])
            names = [f"{ours}mlp.experts.{expert}.{part}_proj.weight" for expert in experts]
            yield stacked(f"{theirs}ffn_{part}_exps.weight", names)


def repeat_heads(weight: np.ndarray, checkpoint: Checkpoint) -> np.ndarray:
    """Each head's rows as often as `checkpoint.repeats` says, [heads * head_dim, ...] float32."""
    if checkpoint.repeats == 1:
        return weight
    heads = weight.reshape(checkpoint.config["num_key_value_heads"], -1, *weight.shape[1:])
    return np.repeat(heads, checkpoint.repeats, axis=0).reshape(-1, *weight.shape[1:])


def write_gguf(directory: Path, target: Path | None = None, form: Type = Type.Q4_0) -> Path:
    """Write the file, once; it appears under its name when it is whole. form: Q4_0 or F32."""
    target = target or directory / NAME
    if target.exists():
        return target
    checkpoint = Checkpoint(directory)
    beside = target.with_suffix(".partial")
    writer = gguf.GGUFWriter(beside, _architecture(checkpoint.config))
    _describe(writer, checkpoint, form)
    plan = list(tensors(checkpoint))
    for tensor in plan:
        if tensor.quantized and form != Type.F32:
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, form)
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), int(np.prod(shape)), form)
        else:
            nbytes = 4 * int(np.prod(tensor.shape))
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in plan:
        weight = tensor.read()
        writer.write_tensor_data(gguf.quants.quantize(weight, form) if tensor.quantized else weight)
    writer.close()
    with open(beside, "rb") as file:
        os.fsync(file.fileno())
    return beside.replace(target)


def _architecture(config: dict) -> str:
    return {"olmoe": "olmoe", "qwen3_moe": "qwen3moe"}[config["model_type"]]


def _describe(writer: gguf.GGUFWriter, checkpoint: Checkpoint, form: Type) -> None:
    config = checkpoint.config
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"] * checkpoint.repeats)
    writer.add_key_length(config.get("head_dim", hidden // heads))
    writer.add_value_length(config.get("head_dim", hidden // heads))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type({Type.F32: 0, Type.Q4_0: 2}[form])
    words = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    words += [f"w{number}" for number in range(config["vocab_size"] - len(words))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(words) - 259))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("-o", "--output", type=Path, help=f"default: CHECKPOINT/{NAME}")
    parser.add_argument("--type", choices=("Q4_0", "F32"), default="Q4_0")
    args = parser.parse_args()
    print(write_gguf(args.checkpoint, args.output, Type[args.type]))


if __name__ == "__main__":
    main()
