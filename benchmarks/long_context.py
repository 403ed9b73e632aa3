"""What a token costs as its text grows, by kind of attention: ms a token, and ms a token of a prompt's chunk.

    python benchmarks/long_context.py DIRECTORY --build       makes DIRECTORY/KIND for each (0.5 GB in all)
    python benchmarks/long_context.py DIRECTORY --json ROWS   measures

Four layers of hidden size 512 with attention as wide as a real model's, few small experts, random weights, float32:
what is left when the experts cost next to nothing. Caches are filled with random numbers instead of by a prompt, which
costs nothing to compute and takes the same memory. Other bundles in DIRECTORY, quantized with --kv int8 or made by an
older export, can be measured beside them (--bundles).
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import append_row, command_line, read_rows

LENGTHS = (64, 1024, 4096, 16384, 32768)
CHUNK = 256
COMMON: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 16,
    "max_position_embeddings": 65536, "num_experts_per_tok": 2, "intermediate_size": 256,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "gqa": {
        "model_type": "qwen3_moe", "num_key_value_heads": 4, "head_dim": 128, "num_experts": 8,
        "moe_intermediate_size": 256,
    },
    "sinks": {  # gpt-oss: every other layer has a window of 128
        "model_type": "gpt_oss", "num_key_value_heads": 4, "head_dim": 64, "num_local_experts": 8,
        "sliding_window": 128,
    },
    "mla": {
        "model_type": "deepseek_v3", "num_key_value_heads": 16, "n_routed_experts": 8, "moe_intermediate_size": 256,
        "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "q_lora_rank": None,
        "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    },
    "linear": {  # Qwen3-Next: every fourth layer has attention
        "model_type": "qwen3_next", "num_key_value_heads": 2, "head_dim": 128, "num_experts": 8,
        "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256,
    },
}  # fmt: skip


def build(directory: Path, kind: str) -> None:
    """A random checkpoint of the kind, exported as it is."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from pocketmoe.export.convert import export_checkpoint

    settings = {**COMMON, **KINDS[kind]}
    model_type = settings.pop("model_type")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings), dtype=torch.float32)
    checkpoint = directory / f"{kind}-checkpoint"
    model.save_pretrained(checkpoint)
    words = {f"<{number}>": number for number in range(COMMON["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<2>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<1>").save_pretrained(checkpoint)
    export_checkpoint(checkpoint, directory / kind)
    shutil.rmtree(checkpoint)


def measure(bundle_path: Path, length: int, tokens: int, threads: int) -> dict[str, Any]:
    """One row: medians in ms of a decoded token, and of a prompt's token, after `length` tokens."""
    from pocketmoe.bundle.reader import Bundle
    from pocketmoe.runtime.engine.engine import Engine
    from pocketmoe.runtime.engine.options import EngineOptions

    bundle = Bundle.open(bundle_path)
    states = bundle.manifest.states
    rng = np.random.default_rng(0)
    with Engine(bundle, EngineOptions(capacity=length + CHUNK + tokens, threads=threads, chunk=CHUNK)) as engine:
        sequence = engine.sequences[0]
        for array in sequence.refill(length).values():
            array[...] = rng.standard_normal(array.shape) * 0.1
        sequence.refilled([2] * length)
        prompt_ms = 1e3 * _seconds(lambda: engine.feed([3] * CHUNK)) / CHUNK
        token_ms = 1e3 * statistics.median(_seconds(lambda: engine.feed([3])) for _ in range(tokens))
        return {
            "bundle": bundle_path.name,
            "length": length,
            "ms_per_token": token_ms,
            "prompt_ms_per_token": prompt_ms,
            "in_place": sum(state.buffered for state in states),
            "growing": sum(state.growing_axis is not None for state in states),
            "backend": engine.opened.backend,
        }


def _seconds(compute: Callable[[], Any]) -> float:
    began = time.perf_counter()
    compute()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--bundles", nargs="+", default=sorted(KINDS), help="folders of DIRECTORY")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--tokens", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="rows are appended here, and not measured twice")
    args = parser.parse_args()
    if args.build:
        args.directory.mkdir(parents=True, exist_ok=True)
        for kind in args.bundles:
            if not (args.directory / kind).exists():
                build(args.directory, kind)
        return
    known = {(row["bundle"], row["length"]): row for row in (read_rows(args.json) if args.json else [])}
    print("| bundle | caches in place | " + " | ".join(f"{length}" for length in args.lengths) + " |")
    print("|---|---|" + "---|" * len(args.lengths))
    for name in args.bundles:
        rows: list[dict[str, Any]] = []
        for length in args.lengths:
            if (name, length) not in known:
                known[name, length] = measure(args.directory / name, length, args.tokens, args.threads)
                if args.json:
                    append_row(args.json, known[name, length])
            rows.append(known[name, length])
        cells = [f"{row['ms_per_token']:.1f} / {row['prompt_ms_per_token']:.2f}" for row in rows]
        print("| " + " | ".join([name, f"{rows[0]['in_place']} of {rows[0]['growing']}", *cells]) + " |", flush=True)
    print(f"\nms a decoded token / ms a token of a chunk of {CHUNK}\n\n`{command_line()}`")


if __name__ == "__main__":
    main()
