"""An OLMoE, Qwen3-MoE or gpt-oss checkpoint as llama.cpp's file: weights in Q4_0 or fp32, routers and norms in fp32.

    python benchmarks/gguf_file.py CHECKPOINT [-o FILE] [--type Q4_0|F32]     needs `pip install gguf`

llama.cpp knows OLMoE only with as many heads of keys and values as of queries. One with fewer gets each of them
several times over, which changes nothing in what it computes: its norm of the keys divides by the mean square of all.
gpt-oss's experts stay in MXFP4, code for code, whatever the type: llama.cpp keeps a block's exponent and codes
together, and the codes of a block's second half in the high nibbles, where the checkpoint has every other one there.
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
    shape: tuple[int, ...]  # of the weights
    form: Type  # of F32 and Q4_0 `read` gives float32, of MXFP4 uint8 [experts, rows, bytes]
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

    def read_bytes(self, name: str) -> np.ndarray:
        """A tensor of codes as it is, uint8."""
        with safe_open(self.directory / self._index[name], "np") as shard:
            return shard.get_tensor(name)


class Names:
    """A checkpoint's tensors under llama.cpp's names; `form`: of what is quantized."""

    def __init__(self, checkpoint: Checkpoint, form: Type) -> None:
        self._checkpoint, self._form = checkpoint, form

    def plain(self, theirs: str, ours: str, *, quantized: bool = True) -> Tensor:
        """A tensor of the very name, `.weight` or `.bias` included."""
        form = self._form if quantized else Type.F32
        return Tensor(theirs, self._checkpoint.shape(ours), form, partial(self._checkpoint.read, ours))

    def weight(self, theirs: str, ours: str, *, quantized: bool = True) -> Tensor:
        return self.plain(f"{theirs}.weight", f"{ours}.weight", quantized=quantized)

    def linear(self, theirs: str, ours: str, *, quantized: bool = True) -> Iterator[Tensor]:
        """A weight and its bias."""
        yield self.weight(theirs, ours, quantized=quantized)
        yield self.plain(f"{theirs}.bias", f"{ours}.bias", quantized=False)

    def repeated(self, theirs: str, ours: str, *, quantized: bool = True) -> Tensor:
        """Rows by heads of keys or values."""
        tensor = self.weight(theirs, ours, quantized=quantized)
        shape = (tensor.shape[0] * self._checkpoint.repeats, *tensor.shape[1:])
        return tensor._replace(shape=shape, read=lambda: repeat_heads(tensor.read(), self._checkpoint))

    def stacked(self, theirs: str, ours: list[str]) -> Tensor:
        """A weight of each expert."""
        shape = (len(ours), *self._checkpoint.shape(ours[0]))
        return Tensor(theirs, shape, self._form, lambda: np.stack([self._checkpoint.read(name) for name in ours]))

    def rows(self, theirs: str, ours: str, rows: slice) -> Iterator[Tensor]:
        """Some rows of all experts' weights in MXFP4, and of their biases."""
        experts, count, blocks = self._checkpoint.shape(f"{ours}_scales")
        shape = (experts, len(range(count)[rows]), 32 * blocks)
        yield Tensor(f"{theirs}.weight", shape, Type.MXFP4, lambda: mxfp4_rows(self._checkpoint, ours, rows))
        bias = self.plain(f"{theirs}.bias", f"{ours}_bias", quantized=False)
        yield bias._replace(shape=shape[:2], read=lambda: np.ascontiguousarray(bias.read()[:, rows]))


def tensors(checkpoint: Checkpoint, form: Type) -> Iterator[Tensor]:
    """All tensors under llama.cpp's names, in the order of the layers."""
    names = Names(checkpoint, form)
    yield names.weight("token_embd", "model.embed_tokens")
    yield names.weight("output", "lm_head")
    yield names.weight("output_norm", "model.norm", quantized=False)
    layer = _gpt_oss_layer if checkpoint.config["model_type"] == "gpt_oss" else _layer
    for number in range(checkpoint.config["num_hidden_layers"]):
        yield from layer(names, checkpoint.config, f"model.layers.{number}.", f"blk.{number}.")


def _layer(names: Names, config: dict, ours: str, theirs: str) -> Iterator[Tensor]:
    yield names.weight(f"{theirs}attn_q", f"{ours}self_attn.q_proj")
    yield names.repeated(f"{theirs}attn_k", f"{ours}self_attn.k_proj")
    yield names.repeated(f"{theirs}attn_v", f"{ours}self_attn.v_proj")
    yield names.weight(f"{theirs}attn_output", f"{ours}self_attn.o_proj")
    yield names.repeated(f"{theirs}attn_k_norm", f"{ours}self_attn.k_norm", quantized=False)
    norms = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    norms |= {"attn_q_norm": "self_attn.q_norm", "ffn_gate_inp": "mlp.gate"}
    for short, name in norms.items():
        yield names.weight(f"{theirs}{short}", f"{ours}{name}", quantized=False)
    for part in ("gate", "up", "down"):
        experts = range(config["num_experts"])
        of = [f"{ours}mlp.experts.{expert}.{part}_proj.weight" for expert in experts]
        yield names.stacked(f"{theirs}ffn_{part}_exps.weight", of)


def _gpt_oss_layer(names: Names, config: dict, ours: str, theirs: str) -> Iterator[Tensor]:  # noqa: ARG001 - as _layer
    for short, name in {"q": "q_proj", "k": "k_proj", "v": "v_proj", "output": "o_proj"}.items():
        yield from names.linear(f"{theirs}attn_{short}", f"{ours}self_attn.{name}")
    yield names.plain(f"{theirs}attn_sinks.weight", f"{ours}self_attn.sinks", quantized=False)
    yield names.weight(f"{theirs}attn_norm", f"{ours}input_layernorm", quantized=False)
    yield names.weight(f"{theirs}post_attention_norm", f"{ours}post_attention_layernorm", quantized=False)
    yield from names.linear(f"{theirs}ffn_gate_inp", f"{ours}mlp.router", quantized=False)
    experts = f"{ours}mlp.experts."
    yield from names.rows(f"{theirs}ffn_gate_exps", f"{experts}gate_up_proj", slice(0, None, 2))
    yield from names.rows(f"{theirs}ffn_up_exps", f"{experts}gate_up_proj", slice(1, None, 2))
    yield from names.rows(f"{theirs}ffn_down_exps", f"{experts}down_proj", slice(None))


def mxfp4_rows(checkpoint: Checkpoint, name: str, rows: slice) -> np.ndarray:
    """Blocks of 32 weights as llama.cpp has them, exponent first, uint8 [experts, rows, 17 * blocks]."""
    codes, exponents = (
        checkpoint.read_bytes(f"{name}_blocks")[:, rows],
        checkpoint.read_bytes(f"{name}_scales")[:, rows],
    )
    found = np.empty((*codes.shape[:-1], 17), np.uint8)
    found[..., 0] = exponents
    first, second = codes[..., :8], codes[..., 8:]  # two codes a byte, in their order: 16 weights each
    found[..., 1::2] = first & 0xF | second << 4
    found[..., 2::2] = first >> 4 | second & 0xF0
    return found.reshape(*found.shape[:2], -1)


def repeat_heads(weight: np.ndarray, checkpoint: Checkpoint) -> np.ndarray:
    """Each head's rows as often as `checkpoint.repeats` says, [heads * head_dim, ...] float32."""
    if checkpoint.repeats == 1:
        return weight
    heads = weight.reshape(checkpoint.config["num_key_value_heads"], -1, *weight.shape[1:])
    return np.repeat(heads, checkpoint.repeats, axis=0).reshape(-1, *weight.shape[1:])


def write_gguf(directory: Path, target: Path | None = None, form: Type = Type.Q4_0) -> Path:
    """Write the file, once; it appears under its name when it is whole. form: Q4_0 or F32, of what is quantized."""
    target = target or directory / NAME
    if target.exists():
        return target
    checkpoint = Checkpoint(directory)
    beside = target.with_suffix(".partial")
    writer = gguf.GGUFWriter(beside, _architecture(checkpoint.config))
    _describe(writer, checkpoint, form)
    plan = list(tensors(checkpoint, form))
    for tensor in plan:
        if tensor.form != Type.F32:
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, tensor.form)
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), int(np.prod(shape)), tensor.form)
        else:
            nbytes = 4 * int(np.prod(tensor.shape))
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in plan:
        weight = tensor.read()
        writer.write_tensor_data(weight if tensor.form == Type.MXFP4 else gguf.quants.quantize(weight, tensor.form))
    writer.close()
    with open(beside, "rb") as file:
        os.fsync(file.fileno())
    return beside.replace(target)


def _architecture(config: dict) -> str:
    return {"olmoe": "olmoe", "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss"}[config["model_type"]]


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
    writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if config["model_type"] == "gpt_oss":
        writer.add_expert_feed_forward_length(config["intermediate_size"])
        writer.add_sliding_window(config["sliding_window"])
        yarn = config["rope_scaling"]
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(yarn["factor"])
        writer.add_rope_scaling_orig_ctx_len(yarn["original_max_position_embeddings"])
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
