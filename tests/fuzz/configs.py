"""config.json in all the states that training and editing leave it in: transformers' tokens, or a refusal in one line."""

# ruff: noqa: E501

from __future__ import annotations

import json
import shutil
from random import Random
from typing import Any

from tests.fuzz import mutate
from tests.fuzz.cases import Case, Compare, Step, command
from tests.fuzz.place import Place
from tests.fuzz.seeds import Seeds

_PROMPT = "once upon a time"
_TOKENS = 6
_FAMILIES = ("mixtral", "qwen3_moe")  # one layer each: an export takes seconds, most of it per layer
_LEFTOVERS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("use_cache", (False, True, None)),
    ("output_router_logits", (True, False)),
    ("output_attentions", (True,)),
    ("output_hidden_states", (True,)),
    ("return_dict", (False, True)),
    ("torchscript", (True,)),
    ("attn_implementation", ("flash_attention_2", "eager", "sdpa", "nonsense")),
    ("_attn_implementation", ("flash_attention_2", "eager")),
    ("attention_dropout", (0.1, 0.5)),
    ("router_aux_loss_coef", (0.5, 0)),
    ("router_jitter_noise", (0.1,)),
    ("gradient_checkpointing", (True,)),
    ("torch_dtype", ("bfloat16", "float16", "float32", "float8_e4m3fn", "nonsense", 5, None, "torch.float32")),
    ("dtype", ("bfloat16", "auto", "x", None)),
    ("pad_token_id", (0, -1, 511, 512, 10**6, None, [1], "1")),
    ("bos_token_id", (0, None, [0], -1, 600, "0")),
    ("eos_token_id", (1, [1, 5], [], None, -1, 600, "1", [[1]], [1, None], 1.0)),
    ("tie_word_embeddings", (True, False, None, "x")),
    ("rope_theta", (10000, 5e5, 1e6, 0, -1, "x", None)),
    (
        "rope_scaling",
        (
            None,
            {},
            {"type": "linear", "factor": 2.0},
            {"rope_type": "dynamic", "factor": 2.0},
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            {"rope_type": "nonsense"},
            "x",
        ),
    ),
    (
        "rope_parameters",
        (
            None,
            {},
            {"rope_type": "default", "rope_theta": 1e6},
            {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "rope_theta": 1e4,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            {"rope_theta": 1e4},
            [],
        ),
    ),
    ("sliding_window", (None, 4, 64, 4096, 0, -1)),
    ("use_sliding_window", (True, False)),
    ("max_window_layers", (0, 1, 28)),
    ("max_position_embeddings", (16, 64, 10**6, 0, -1, None, 1e3)),
    ("transformers_version", ("4.36.0", "9.9", None, 5)),
    ("architectures", (None, [], ["MixtralForSequenceClassification"], ["Nonsense"], "MixtralForCausalLM", [5])),
    ("model_type", ("mixtral", "qwen3_moe", "llama", "nonsense", None, 5, "")),
    ("auto_map", ({"AutoConfig": "x.Y"}, {"AutoModelForCausalLM": "evil.Model"}, 5)),
    ("hidden_act", ("silu", "gelu", "relu", "gelu_pytorch_tanh", "nonsense", None)),
    ("rms_norm_eps", (1e-5, 1e-6, 0, 1e-3, "1e-5", None)),
    ("initializer_range", (0.02, float("nan"), float("inf"), None)),
    ("time_step_limit", ([0.0, float("inf")],)),
    ("num_experts_per_tok", (1, 2, 3, 4, 5, 0, -1, None, 2.0, "2")),
    ("norm_topk_prob", (True, False, None)),
    ("decoder_sparse_step", (1, 2, 0)),
    ("mlp_only_layers", ([], [0], [5], None)),
    ("vocab_size", (511, 513, 300, 0, None)),
    ("num_hidden_layers", (0, 1, 2, None, "1")),
    ("num_key_value_heads", (1, 2, None, 0, 3)),
    ("head_dim", (16, 8, None, 0)),
    (
        "quantization_config",
        (None, {}, {"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "gptq", "bits": 4}),
    ),
    ("text_config", ({}, None, {"hidden_size": 5})),
    ("experts_implementation", ("grouped_mm", "nonsense")),
    ("_experts_implementation", ("batched_mm",)),
    ("repetition_penalty", (1.5,)),
    ("temperature", (0.1,)),
    ("num_beams", (4,)),
    ("is_decoder", (True, False)),
    ("is_encoder_decoder", (True,)),
    ("id2label", ({"0": "a"}, {"x": 1})),
    ("num_labels", (5, -1)),
    ("problem_type", ("x",)),
    ("chunk_size_feed_forward", (4,)),
    ("pruned_heads", ({"0": [0]},)),
    ("_name_or_path", ("../../canary", None, 5)),
    ("use_return_dict", (False,)),
    ("layer_types", (["full_attention"], ["sliding_attention"], [], ["x"], None)),
)


def make(random: Random, place: Place, seeds: Seeds) -> Case:
    """A checkpoint at cwd/c whose config.json is another one."""
    family = random.choice(_FAMILIES)
    checkpoint = place.cwd / "c"
    shutil.copytree(seeds.checkpoint(family), checkpoint)
    path = checkpoint / "config.json"
    data, what = mutate_config(random, path.read_bytes())
    path.write_bytes(data)
    if random.random() < 0.3:
        (checkpoint / "generation_config.json").unlink()
        what += "; no generation_config.json"
    run = command("run", "b", "--raw", "--prompt", _PROMPT, "--max-tokens", _TOKENS, "--json")
    steps = (Step(command("export", "c", "-o", "b", heavy=True), writes=("b",)), Step(run))
    compare = Compare("c", ({"text": _PROMPT, "chat": False},), _TOKENS)
    return Case("config", f"{family}: {what}", steps, compare=compare)


def mutate_config(random: Random, data: bytes) -> tuple[bytes, str]:
    if random.random() < 0.05:
        return mutate.raw(random, data)
    document, notes = json.loads(data), []
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        if random.random() < 0.65:
            name, values = random.choice(_LEFTOVERS)
            document[name] = random.choice(values)
            notes.append(f"{name} = {mutate.shown(document[name])}")
        else:
            document, note = mutate.edit(random, document)
            notes.append(note)
    return mutate.json_bytes(document, indent=random.choice([None, 2])), "; ".join(notes)
