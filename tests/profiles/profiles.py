"""A profile as `pocketmoe profile` writes it, made by hand: OLMoE-1B-7B in int4 on a machine of round numbers."""

# pyright: reportArgumentType=false

from __future__ import annotations

from pathlib import Path
from typing import Any

from pocketmoe.profiles import profile as schema

EXPERT = 3 * 2048 * 1024
DENSE = 371_000_000  # attention, head and the rest


def make_profile(**model: Any) -> schema.Profile:
    """Two budgets: 10 tokens/s, first token after 2 s; 20 tokens/s after 4 s."""
    return schema.Profile(
        machine=schema.Machine(
            cpu="Round Numbers CPU",
            architecture="x86_64",
            features=("avx2",),
            cores=4,
            memory_bytes=16 * 10**9,
            ram_one_thread_bytes_per_s=1e10,
            ram_bytes_per_s=3e10,
        ),
        model=schema.Model(
            **{
                "name": "olmoe-int4",
                "bundle_sha256": "0" * 64,
                "source": "allenai/OLMoE-1B-7B-0924",
                "architecture": "OlmoeForCausalLM",
                "parameters": 6_919_161_856,
                "context_length": 4096,
                "experts": (64,) * 16,
                "experts_per_token": (8,) * 16,
                "expert_read_bytes": round(EXPERT * 4.5625 / 8),
                "expert_slot_bytes": 4_000_000,
                "dense_bytes": round(DENSE * 8.5 / 8),
                "head_bytes": round(50304 * 2048 * 8.5 / 8),
                "state_bytes_per_token": 16 * 2 * 2048 * 4,
                "schemes": {"experts": "int4-b64-asym", "attention": "int8-b64", "head": "int8-b64", "norm": "fp32"},
            }
            | model
        ),
        memory=schema.Memory(fixed_bytes=600_000_000, loading_bytes=60_000_000, least_bytes=700_000_000),
        workload=schema.Workload(source="seeded tokens", prompt_tokens=128, output_tokens=41, prompt_sha256="0" * 64),
        settings=schema.Settings(threads=4),
        expert=schema.ExpertCosts(read_one_s=0.002, read_more_s=0.0015, check_s=0.0, slot_s=0.0),
        runs=(_run("25%", 10.0, 2.0, 0.6), _run("100%", 20.0, 4.0, 1.0)),
    )


def _run(memory: str, tokens_per_s: float, ttft_s: float, hit_rate: float) -> schema.Run:
    return schema.Run(
        memory=memory,
        memory_budget_bytes=1_500_000_000,
        limited_by="process",
        peak_memory_bytes=1_400_000_000,
        expert_slots=256,
        expert_share=0.25,
        start_s=1.0,
        ttft_s=ttft_s,
        prefill_tokens_per_s=128 / ttft_s,
        decode_tokens_per_s=tokens_per_s,
        mean_tokens_per_s=tokens_per_s,
        step_median_s=1 / tokens_per_s,
        step_p95_s=1.5 / tokens_per_s,
        step=schema.Step(mean_s=1 / tokens_per_s, segments=0.5, experts=0.3, waiting=0.1, python=0.1),
        hit_rate=hit_rate,
        prefetch_hit_rate=0.0,
        misses_per_token=10.0,
        prompt_reads=1000,
        bytes_read=10**9,
        bytes_read_per_token=1e7,
        bytes_prefetched=0,
        prefetch_precision=0.0,
        load_s=0.002,
        read_one_s=0.002,
        read_more_s=0.0015,
        major_faults=0,
        tokens_sha256="0" * 64,
        backend="slots",
        threads=4,
    )


def write(directory: Path, profile: schema.Profile) -> Path:
    """As profile.json in that directory."""
    path = directory / schema.PROFILE
    schema.write_profile(path, profile)
    return path
