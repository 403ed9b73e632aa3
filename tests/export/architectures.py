"""Every MoE architecture that the installed transformers knows: found, made tiny, exported, run and compared.

Nothing here lists models. `discover` asks transformers; `tiny_config` shrinks a configuration by what its fields are
for; only values that no rule can know (sizes that must fit together in one model's own way) stand in `SPECIAL`.
"""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pocketmoe.bundle.reader import Bundle
from pocketmoe.runtime.backends.choice import BackendName
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.options import EngineOptions
from tests import tiny

BACKENDS: tuple[BackendName, ...] = ("auto", "sessions")
PREFILL, DECODE = 17, 8
PARITY = 1e-3  # the largest difference of logits that counts as the same model

_HIDDEN, _LAYERS, _HEADS, _HEAD = 64, 4, 4, 16
_WINDOW = 14  # longer than the sample that the capture is made of, as a real one is; shorter than the text

# What a field's value becomes in a tiny model, by the field's name. A field that a configuration does not have, or
# leaves at None, is left alone.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), tiny.VOCAB),
    **dict.fromkeys(("hidden_size", "d_model"), _HIDDEN),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "num_layers", "num_decoder_layers"), _LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), _LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_heads", "num_heads", "swa_num_attention_heads"), _HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), _HEADS),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(
        ("head_dim", "swa_head_dim", "kv_channels", "v_head_dim", "qk_nope_head_dim", "index_head_dim"), _HEAD
    ),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "num_expert_group"), 2),
    "topk_group": 1,
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "dense_intermediate_size", "intermediate_size_mlp"), 64),
    **dict.fromkeys(("d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "moe_latent_size"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("shared_experts_intermediate_size", "shared_intermediate_size"), 48),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    "q_lora_rank": 32,
    **dict.fromkeys(("kv_lora_rank", "o_lora_rank", "gated_norm_rank", "hc_lowrank", "d_rel"), 16),
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "rotary_dim": 8,
    "linear_num_key_heads": 2,
    "index_n_heads": 16,  # the sum over few heads of ReLU is often exactly 0, and top-k among equals is anyone's guess
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), _HEAD),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), _HEAD),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "mamba_dt_rank"), 16),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "block_size"), 16),
    "n_groups": 2,
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size", "index_topk"), _WINDOW),
    **dict.fromkeys(("max_position_embeddings", "model_max_length", "max_seq_len"), 256),
    "router_hidden_size": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}

_ALWAYS = {"head_dim", "n_routed_experts", "num_experts", "num_experts_per_tok", "top_k_experts"}  # even where None

_QWEN4_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        "swa_num_attention_heads": _HEADS,
        "swa_num_key_value_heads": _HEADS,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
        "head_dim": 24,
        "index_head_dim": 16,
    },
    "gemma4_text": {"enable_moe_block": True, "moe_intermediate_size": 32, "hidden_size_per_layer_input": 16},
    "bailing_hybrid": {"layer_group_size": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2, "shared_intermediate_size": 48},
    "hunyuan_v1_moe": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0}
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 8},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": _HIDDEN, "ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "dots3_note": {"vision_config": {"adapter_out_dim": _HIDDEN}, "audio_config": {"adapter_out_dim": _HIDDEN}},
    "llama4_text": {"num_experts_per_tok": 1},
    "longcat_flash": {"num_layers": 2, "num_hidden_layers": ..., "zero_expert_num": 4},
    "deepseek_v2": {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    "doge": {"is_moe": True, "num_experts": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "nemotron_h": {"moe_latent_size": 32},
    "phimoe": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "short_factor": [1 + n / 10 for n in range(_HEAD // 2)],
            "long_factor": [2 + n / 10 for n in range(_HEAD // 2)],
            "short_mscale": 1.1,
            "long_mscale": 1.3,
            "original_max_position_embeddings": 20,  # between the prefill and the end of the text
        }
    },
    "qwen4_exp_text": _QWEN4_INDEXER,
    "zaya": {"num_experts_per_tok": 1},
}


@dataclass(frozen=True)
class Row:
    """One architecture's result."""

    model_type: str
    works: bool
    max_abs_logit_diff: float | None = None
    tokens_equal: bool | None = None
    reason: str = ""
    backends: dict[str, str] | None = None  # by scheme, what a user gets: slots, or why not
    caches: int = 0  # states that grow
    caches_in_place: int = 0  # of those, filled in one buffer
    layers: int = 0  # with experts
    layers_guessed: int = 0  # of those but the first, whose experts a router graph can predict
    nodes: int = 0  # of the segment of a layer with experts, the median of those after the first
    prefer_cached: str = ""  # "yes", or why a layer cannot prefer experts in memory


def discover() -> list[str]:
    """Every model_type with a language model whose code has routed experts.

    Those are classes behind the experts interface, those with a form of ours, and, so that the table says what is
    missing, whatever else calls itself experts or a mixture of them, encoder-decoders included.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    found = []
    models = {**auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}
    for model_type, name in models.items():
        source = Path(inspect.getfile(getattr(transformers, name))).read_text(encoding="utf-8")
        if "use_experts_implementation" in source or _OTHER_EXPERTS.search(source):
            found.append(model_type)
    return sorted(found)


_OTHER_EXPERTS = re.compile(r"^class \w+(?:Experts|ExpertGLU|MoE|Moe)\(nn\.Module(?:Dict|List)?\)", re.MULTILINE)


@cache
def tiny_config(model_type: str) -> Any:
    """A configuration of the architecture with everything in it, small."""
    from transformers import AutoConfig

    default = AutoConfig.for_model(model_type)
    return type(default)(**_shrunk(default, SPECIAL.get(model_type, {})))


def _shrunk(default: Any, special: dict[str, Any]) -> dict[str, Any]:
    """The constructor's arguments: only sizes, so that what follows from them (lists by layer) is derived anew."""
    small, fields = {}, default.to_dict()
    for name, value in fields.items():
        if name in _SIZES and (value is not None or name in _ALWAYS) and not isinstance(value, list | dict):
            small[name] = _SIZES[name]
    for name, same in (("num_key_value_heads", "num_attention_heads"), ("head_dim", "qk_rope_head_dim")):
        if name in small and same in small and fields[name] == fields[same]:
            small[name] = small[same]  # what is equal stays equal
    for name, config in fields.items():
        if name == "text_config" and isinstance(config, dict):
            small[name] = _shrunk(default.text_config, SPECIAL.get(default.text_config.model_type, {}))
    small.update(special)
    return {name: value for name, value in small.items() if value is not ...}


def compare(model_type: str, checkpoint: Path, bundle: Bundle, work: Path) -> Row:
    """Continue a text with the bundle of a tiny random model of the architecture, and with transformers.

    The bundle runs in the runtime, with the backend that a user gets; logits of a prefill of 17 tokens and of 8 greedy
    steps. Quantized, it runs with either backend, which must give the same bits.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    prompt = [int(n) for n in np.random.default_rng(0).integers(3, tiny.VOCAB - 1, PREFILL)]
    differences, equal, text, limit = [], True, [*prompt], bundle.manifest.model.computed_anew_beyond
    with Engine(bundle, EngineOptions(capacity=64)) as engine, torch.no_grad():
        backends = {"fp32": _backend(engine)}
        expected = model(torch.tensor([prompt]), use_cache=True)
        found = engine.feed(prompt, rows="all")
        for step in range(DECODE + 1):
            logits = expected.logits[0, -len(found) :].float().numpy()
            differences.append(float(np.abs(found - logits).max()))
            token = int(logits[-1].argmax())
            equal = equal and token == int(found[-1].argmax())
            if step < DECODE:
                text.append(token)
                past = None if len(text) - 1 == limit else expected.past_key_values
                new = text if past is None else [token]  # as `generate` does where longrope changes its factors
                expected = model(torch.tensor([new]), past_key_values=past, use_cache=True)
                found = engine.feed([token], rows="all")
        whole = model(torch.tensor([prompt])).logits[0, -1].float().numpy()
        for pieces in ([prompt], [prompt[:6], prompt[6:]]):  # a long prompt is fed in pieces
            engine.reset()
            last = [engine.feed(piece) for piece in pieces][-1]
            differences.append(float(np.abs(last[0] - whole).max()))
    worst = max(differences)
    works = bool(equal and worst <= PARITY)
    reason = "" if works else f"logits differ (prefill {differences[0]:.2g}, decode {max(differences[1:]):.2g})"
    backends |= {scheme: _quantized(bundle, work / scheme, scheme, prompt) for scheme in ("int8", "int4")}
    manifest = bundle.manifest
    caches = [state for state in manifest.states if state.growing_axis is not None]
    return Row(
        model_type,
        works,
        worst,
        equal,
        reason,
        backends,
        caches=len(caches),
        caches_in_place=sum(state.buffered for state in caches),
        layers=len(manifest.moe_layers),
        layers_guessed=sum(layer.router is not None for layer in manifest.moe_layers[1:]),
        nodes=_nodes(bundle),
        prefer_cached=_prefer_cached(bundle),
    )


def _nodes(bundle: Bundle) -> int:
    import statistics

    import onnx

    segments = bundle.manifest.segments
    counts = [len(onnx.load(bundle.path(s.graph), load_external_data=False).graph.node) for s in segments[1:-1]]
    return int(statistics.median_low(counts)) if counts else 0


def _backend(engine: Engine) -> str:
    return engine.opened.backend + (f": {engine.opened.backend_reason}" if engine.opened.backend_reason else "")


def _quantized(bundle: Bundle, target: Path, scheme: str, prompt: list[int]) -> str:
    """The backend of the quantized bundle, or why there is none; also where the backends do not give the same bits."""
    from pocketmoe.errors import PocketMoEError
    from pocketmoe.quantize.apply import quantize_bundle

    found: dict[str, np.ndarray] = {}
    try:
        quantized = quantize_bundle(bundle.root, target, scheme=scheme)
        said = ""
        for backend in BACKENDS:
            with Engine(quantized, EngineOptions(capacity=64, backend=backend)) as engine:
                found[backend] = engine.feed(prompt, rows="all")
                said = said or _backend(engine)
    except PocketMoEError as error:
        return f"refused: {_reason(error)}"
    return said if np.array_equal(found["auto"], found["sessions"]) else f"{said}, but sessions give other logits"


def _prefer_cached(bundle: Bundle) -> str:
    from pocketmoe.errors import BadInput
    from pocketmoe.runtime.engine.cache_routing import CacheAwareRouting

    manifest = bundle.manifest
    try:
        CacheAwareRouting(0.5, manifest.moe_layers).models([bundle.path(s.graph) for s in manifest.segments[:-1]])
    except BadInput as reason:
        return str(reason)
    return "yes"


def _reason(error: BaseException) -> str:
    """The first line of an error, without the directory of the tiny checkpoint."""
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    return re.sub(r"(?<![\w/])/\S*/(checkpoint: )?", "", line.removeprefix("UnsupportedModel: "))[:300]


if __name__ == "__main__":  # one row in a process of its own: python -m tests.export.architectures MODEL_TYPE
    import json
    import tempfile
    import traceback
    import warnings

    import torch

    from pocketmoe.export.convert import export_checkpoint

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as directory:
        try:
            root = Path(directory)
            source = tiny.save_checkpoint(root / "checkpoint", tiny.randomize(tiny_config(sys.argv[1])))
            row = compare(sys.argv[1], source, export_checkpoint(source, root / "bundle"), root)
        except Exception as error:  # noqa: BLE001 ; whatever goes wrong is the row's reason
            traceback.print_exc()
            row = Row(sys.argv[1], works=False, reason=_reason(error))
    sys.stdout.write(json.dumps(asdict(row)) + "\n")
