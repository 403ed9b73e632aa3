"""Decode speed against llama.cpp under the same memory limits, with the same weights and the same tokens.

    python benchmarks/make_checkpoint.py olmoe-1b-7b --layers 4 -o CHECKPOINT
    pocketmoe export CHECKPOINT -o FP32 && pocketmoe quantize FP32 -o BUNDLE --scheme int4
    python benchmarks/against_llamacpp.py CHECKPOINT BUNDLE [--trace TRACE.npy] [--tokens 64]

Needs root (memory cgroups), and beside the project `pip install gguf xllamacpp`. Writes CHECKPOINT/q4_0.gguf once.
Each row is two fresh processes with cold caches in a memory cgroup of the same size, 2 threads. Tokens are given, one
at a time (teacher-forced), the same to both. Random routers choose nearly uniformly; with --trace (int16 [tokens,
layers, top_k], as of a real model) our engine follows that routing instead. llama.cpp routes by its weights, so that
its figure does not change with --trace: read those ratios as what we gain by real routing, not as a fair race.
llama.cpp is tried with its defaults (repacked weights), then without repacking; the faster one that lives counts.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np

from pocketmoe.profiles.limit import run_limited

SHARES = (None, 0.75, 0.5, 0.35, 0.25, 0.125)
PROMPT = 32
THREADS = 2
PEER_SECONDS = 40  # after so long llama.cpp's speed is known; it reads gigabytes for each token then


def given_tokens(count: int) -> list[int]:
    """The same varied tokens for both engines."""
    return np.random.default_rng(0).integers(300, 40000, count).tolist()


def write_gguf(checkpoint: Path, target: Path) -> None:
    """The checkpoint's own weights as llama.cpp's Q4_0; routers and norms in fp32."""
    import gguf
    from safetensors import safe_open

    config = json.loads((checkpoint / "config.json").read_text())
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    layers, experts, hidden = config["num_hidden_layers"], config["num_experts"], config["hidden_size"]

    def read(name: str) -> np.ndarray:
        with safe_open(checkpoint / index[name], "pt") as shard:
            return shard.get_tensor(name).float().numpy()

    writer = gguf.GGUFWriter(target, "olmoe")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(2)
    words = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    words += [f"w{number}" for number in range(config["vocab_size"] - len(words))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(words) - 259))

    def add(name: str, weight: np.ndarray, quantized: bool = True) -> None:
        kind = gguf.GGMLQuantizationType.Q4_0
        writer.add_tensor(
            name, gguf.quants.quantize(weight, kind) if quantized else weight, raw_dtype=kind if quantized else None
        )

    add("token_embd.weight", read("model.embed_tokens.weight"))
    add("output.weight", read("lm_head.weight"))
    add("output_norm.weight", read("model.norm.weight"), quantized=False)
    for layer in range(layers):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        for short, name in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("output", "o_proj")):
            add(f"{theirs}attn_{short}.weight", read(f"{ours}self_attn.{name}.weight"))
        norms = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
        norms |= {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
        for short, name in norms.items():
            add(f"{theirs}{short}.weight", read(f"{ours}{name}.weight"), quantized=False)
        add(f"{theirs}ffn_gate_inp.weight", read(f"{ours}mlp.gate.weight"), quantized=False)
        for part in ("gate", "up", "down"):
            stacked = np.stack([read(f"{ours}mlp.experts.{e}.{part}_proj.weight") for e in range(experts)])
            add(f"{theirs}ffn_{part}_exps.weight", stacked)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()


def run_ours(bundle_path: Path, memory_bytes: int | None, tokens: list[int], trace: Path | None) -> dict:
    """One engine, loaded and fed in this process."""
    from pocketmoe.bundle import Bundle
    from pocketmoe.runtime.budget import major_faults
    from pocketmoe.runtime.engine import Engine, EngineOptions
    from pocketmoe.runtime.fitting import MemoryRequest

    began = time.perf_counter()
    memory = MemoryRequest(total_bytes=memory_bytes) if memory_bytes else MemoryRequest(expert_share=1.0)
    with Engine(Bundle.open(bundle_path), EngineOptions(memory, capacity=len(tokens) + 8, threads=THREADS)) as engine:
        ready = time.perf_counter()
        if trace:
            follow(engine, np.load(trace))
        engine.feed(tokens[:PROMPT])
        first = time.perf_counter()
        stats = engine.stats
        hits, misses, read, waited, faults = stats.hits, stats.misses, stats.bytes_read, stats.wait_s, major_faults()
        cpu = time.process_time()
        for token in tokens[PROMPT:]:
            engine.feed([token])
        decode_s, count = time.perf_counter() - first, len(tokens) - PROMPT
        return {
            "tokens_per_s": count / decode_s,
            "start_s": ready - began,
            "ttft_s": first - ready,
            "hit_rate": (stats.hits - hits) / max(1, stats.hits - hits + stats.misses - misses),
            "read_mb_per_token": (stats.bytes_read - read) / count / 1e6,
            "wait_share": (stats.wait_s - waited) / decode_s,
            "cpu_s_per_token": (time.process_time() - cpu) / count,
            "major_faults_per_token": (major_faults() - faults) / count,
            "peak_mb": engine.budget.peak_bytes / 1e6,
        }


def follow(engine: object, trace: np.ndarray) -> None:
    """Make the engine's routing that of a trace, over and over; deeper layers start from the trace's first again."""
    pager = engine._pager  # type: ignore[attr-defined]
    run_layer, position = pager.run_layer, {}

    def run_traced(layer: int, x: np.ndarray, expert_ids: np.ndarray) -> np.ndarray:
        start = position.get(layer, 0)
        position[layer] = start + len(expert_ids)
        rows = np.arange(start, start + len(expert_ids)) % len(trace)
        return run_layer(layer, x, trace[rows, layer % trace.shape[1]].astype(np.int64))

    pager.run_layer = run_traced


def run_peer(gguf_path: Path, tokens: list[int], repack: bool) -> dict:
    """llama.cpp in this process, the prompt growing by one token a request and its cache reused."""
    import xllamacpp

    began = time.perf_counter()
    params = xllamacpp.CommonParams()
    params.model.path = str(gguf_path)
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
    params.warmup, params.n_parallel, params.verbosity, params.fit_params = False, 1, -1, False
    params.no_extra_bufts = not repack
    server = xllamacpp.Server(params)
    ready = time.perf_counter()

    def feed(count: int) -> None:
        request = {
            "prompt": tokens[:count],
            "n_predict": 1,
            "ignore_eos": True,
            "cache_prompt": True,
            "temperature": 0.0,
        }
        server.handle_completions(request)

    feed(PROMPT)
    first = time.perf_counter()
    faults, read = resource.getrusage(resource.RUSAGE_SELF).ru_majflt, disk_bytes()
    for count in range(PROMPT + 1, len(tokens) + 1):
        feed(count)
        if time.perf_counter() - first > PEER_SECONDS:
            break
    decode_s, done = time.perf_counter() - first, count - PROMPT
    return {
        "tokens_per_s": done / decode_s,
        "start_s": ready - began,
        "ttft_s": first - ready,
        "read_mb_per_token": (disk_bytes() - read) / done / 1e6,
        "major_faults_per_token": (resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults) / done,
    }


def disk_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split(":")[1] for line in lines if line.startswith("read_bytes")))


def measure(worker: list[str], limit_bytes: int | None) -> dict | None:
    """A worker's figures, from a cold start under a limit; None when it was killed or refused."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    done = run_limited([sys.executable, __file__, *worker], limit_bytes, timeout_s=400)
    if done.returncode:
        print(f"  {worker[0]}: exit {done.returncode} {done.stderr.strip()[-200:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, help="append the rows here")
    args = parser.parse_args()
    gguf_path = args.checkpoint / "q4_0.gguf"
    if not gguf_path.exists():
        write_gguf(args.checkpoint, gguf_path)
    size = gguf_path.stat().st_size
    common = ["--tokens", str(args.tokens)]
    traced = ["--trace", str(args.trace)] if args.trace else []
    measure(["ours", str(args.bundle), "0", *common], None)  # packs the experts for this CPU
    print(f"Q4_0 file {size / 1e6:.0f} MB; {THREADS} threads; {args.tokens} tokens; routing {args.trace or 'uniform'}")
    print(
        "| memory | ours tokens/s | hits | MB read/token | waiting | faults/token "
        "| llama.cpp tokens/s | MB read/token | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for share in SHARES:
        limit = None if share is None else int(share * size)
        ours = measure(["ours", str(args.bundle), str(limit or 0), *common, *traced], limit)
        peers = [measure(["peer", str(gguf_path), repack, *common], limit) for repack in ("1", "0")]
        peer = max((p for p in peers if p), key=lambda p: p["tokens_per_s"], default=None)
        print(row(share, limit, ours, peer), flush=True)
        if args.json:
            with open(args.json, "a") as file:
                record = {
                    "share": share,
                    "limit_bytes": limit,
                    "trace": str(args.trace or ""),
                    "ours": ours,
                    "peer": peer,
                }
                file.write(json.dumps(record) + "\n")


def row(share: float | None, limit: int | None, ours: dict | None, peer: dict | None) -> str:
    name = "no limit" if limit is None else f"{share:.1%} ({limit / 1e6:.0f} MB)"
    cells = [name]
    if ours:
        cells += [f"{ours['tokens_per_s']:.1f}", f"{ours['hit_rate']:.0%}", f"{ours['read_mb_per_token']:.0f}"]
        cells += [f"{ours['wait_share']:.0%}", f"{ours['major_faults_per_token']:.1f}"]
    else:
        cells += ["refused", "", "", "", ""]
    cells += [f"{peer['tokens_per_s']:.2f}", f"{peer['read_mb_per_token']:.0f}"] if peer else ["killed", ""]
    cells.append(f"{ours['tokens_per_s'] / peer['tokens_per_s']:.2f}" if ours and peer else "")
    return "| " + " | ".join(cells) + " |"


def worker() -> None:
    """`ours BUNDLE BYTES` or `peer GGUF REPACK`, then options: prints one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("which")
    parser.add_argument("path", type=Path)
    parser.add_argument("setting", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--trace", type=Path)
    args = parser.parse_args()
    tokens = given_tokens(PROMPT + args.tokens)
    if args.which == "ours":
        print(json.dumps(run_ours(args.path, args.setting or None, tokens, args.trace)), flush=True)
    else:
        print(json.dumps(run_peer(args.path, tokens, bool(args.setting))), flush=True)
        os._exit(0)  # the server's threads do not end by themselves


if __name__ == "__main__":
    worker() if sys.argv[1:2] in (["ours"], ["peer"]) else main()
