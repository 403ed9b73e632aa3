"""A tiny checkpoint as a GGUF file, by the gguf package, the way llama.cpp's converter names and orders things."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

Kind = gguf.GGMLQuantizationType
_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip


_MINIMAX = {
    **{name: short for name, short in _LAYER.items() if name != "mlp.gate"},
    "block_sparse_moe.gate": "ffn_gate_inp", "block_sparse_moe.e_score_correction_bias": "exp_probs_b.bias",
}  # fmt: skip
_ARCHITECTURES = {  # layers' names, an expert's, and its three matrices'
    "qwen3moe": (_LAYER, "mlp.experts", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
    "minimax-m2": (_MINIMAX, "block_sparse_moe.experts", {"gate": "w1", "up": "w3", "down": "w2"}),
}


def _kind(name: str, array: np.ndarray) -> Kind:
    """Norms and routers in float32, the embedding in Q8_0, values in Q4_1, all else in Q4_0."""
    if array.ndim == 1 or name.endswith(("mlp.gate", "moe.gate")):
        return Kind.F32
    if "embed" in name or "lm_head" in name:
        return Kind.Q8_0
    return Kind.Q4_1 if "v_proj" in name else Kind.Q4_0


def write(source: Path, target: Path, twin: Path, architecture: str = "qwen3moe") -> None:
    """`source`, a checkpoint, to the file `target`, and what its numbers then are to the directory `twin`."""
    layer_names, experts_name, matrices = _ARCHITECTURES[architecture]
    config = json.loads((source / "config.json").read_text())
    n_experts = config.get("num_experts", config.get("num_local_experts"))
    tensors = {name.removesuffix(".weight"): t.float() for name, t in load_file(source / "model.safetensors").items()}
    writer = gguf.GGUFWriter(target, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    if architecture == "minimax-m2":
        writer.add_rope_dimension_count(config["rotary_dim"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_count(n_experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config.get("moe_intermediate_size", config["intermediate_size"]))
    _add_tokenizer(writer, source, config["vocab_size"])
    plain: dict[str, torch.Tensor] = {}

    def stored(name: str) -> tuple[np.ndarray, Kind]:
        array = tensors[name].numpy()
        kind = _kind(name, array)
        data = array if kind == Kind.F32 else gguf.quants.quantize(array, kind)
        values = array if kind == Kind.F32 else gguf.quants.dequantize(data, kind)
        plain[name if name.endswith("_bias") else f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(values))
        return data, kind

    for name, short in (("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")):
        if name in tensors:
            data, kind = stored(name)
            writer.add_tensor(f"{short}.weight", data, raw_dtype=kind)
    for layer in range(config["num_hidden_layers"]):
        for name, short in layer_names.items():
            data, kind = stored(f"model.layers.{layer}.{name}")
            leaf = "" if short.endswith(".bias") else ".weight"
            writer.add_tensor(f"blk.{layer}.{short}{leaf}", data, raw_dtype=kind)
        for part, matrix in matrices.items():
            names = [f"model.layers.{layer}.{experts_name}.{e}.{matrix}" for e in range(n_experts)]
            experts = [stored(name) for name in names]
            data = np.stack([data for data, _ in experts])
            writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.weight", data, raw_dtype=experts[0][1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    twin.mkdir()
    save_file(plain, twin / "model.safetensors", metadata={"format": "pt"})
    twins = {**config, "rope_parameters": {**config["rope_parameters"], "rope_theta": 10000.0}}
    (twin / "config.json").write_text(json.dumps({**twins, "norm_topk_prob": True}))


def _add_tokenizer(writer: gguf.GGUFWriter, source: Path, n_tokens: int) -> None:
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    tokens += [f"<unused{number}>" for number in range(n_tokens - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    kinds = [3 if token in ("<s>", "</s>") else 5 if token.startswith("<unused") else 1 for token in tokens]
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
