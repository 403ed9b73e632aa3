"""Tiny random checkpoints of each architecture's own transformers class, and their tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCAB = 512
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "olmoe": {
        **_SMALL,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_experts": 8,
        "intermediate_size": 64,
        "norm_topk_prob": False,
    },
    "qwen3_moe": {
        **_SMALL,
        "num_experts": 8,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
    "mixtral": {**_SMALL, "num_local_experts": 8, "intermediate_size": 32},
    "granitemoe": {**_SMALL, "num_local_experts": 8, "intermediate_size": 32},
    "gpt_oss": {
        **_SMALL,
        "num_local_experts": 8,
        "intermediate_size": 32,
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "deepseek_v3": {
        **_SMALL,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    },
    "qwen2_moe": {
        **_SMALL,
        "num_experts": 8,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    },
    "phimoe": {**_SMALL, "num_local_experts": 8, "intermediate_size": 32},
    "glm4_moe": {
        **_SMALL,
        "first_k_dense_replace": 1,
        "head_dim": 16,
        "n_routed_experts": 8,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "n_group": 1,
        "topk_group": 1,
    },
    "llama": {k: v for k, v in _SMALL.items() if k != "num_experts_per_tok"} | {"intermediate_size": 64},
}

_TEXT = (
    "The quick brown fox jumps over the lazy dog. A mixture of experts routes each token to a few of many "
    "small networks, so that most of the weights rest while the model answers. Once upon a time there was a "
    "little girl who lived in a village near the forest, and whenever she went out she wore a red cloak. "
)


def make_model(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A random model in float32 whose norms and biases are not trivial, so that a lost one shows in the logits."""
    from transformers import AutoConfig

    return randomize(AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **changes}), seed)


def randomize(config: Any, seed: int = 0) -> Any:
    """The language model of a configuration, with random weights as `make_model` has them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    torch.manual_seed(seed)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            leaf = name.rpartition(".")[2]
            if "norm" in name and leaf == "weight":
                tensor.uniform_(0.5, 1.5)
            elif "bias" in leaf or leaf == "sinks":
                tensor.normal_(0, 0.1)
            elif "embed_tokens" in name:
                tensor.normal_(0, 0.5)
            elif tensor.ndim > 1 and isinstance(tensor, torch.nn.Parameter):  # buffers follow from the configuration
                tensor.normal_(0, tensor.shape[-1] ** -0.5)
    return model


def save_tokenizer(directory: Path) -> None:
    """A byte-level BPE of at most VOCAB tokens with a chat template; 0 is <s>, 1 is </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"
    )
    fast.save_pretrained(directory)


def save_checkpoint(directory: Path, model: Any, **save_options: Any) -> Path:
    """Write model, tokenizer and a model card the way the hub has them; return the directory."""
    model.save_pretrained(directory, **save_options)
    save_tokenizer(directory)
    (directory / "README.md").write_text(
        "---\nlicense: apache-2.0\nbase_model: someone/base\n---\n# Tiny\n\nRandom weights.\n"
    )
    return directory
