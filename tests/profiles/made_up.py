"""A profile of round numbers, made up, in which everything fits together."""

from __future__ import annotations

from typing import Any

import msgspec

from pocketmoe.profiles.profile import (
    CachePoint,
    ExpertCosts,
    Machine,
    Memory,
    Model,
    Profile,
    ReadSpeed,
    Routing,
    Run,
    Settings,
    Step,
    Workload,
)

LAYERS, EXPERTS, TOP_K = 2, 8, 2
TOKENS = 11  # of the answer, the last of which is never run

MODEL = Model(
    name="made up",
    bundle_sha256="ab" * 32,
    architecture="MadeUpForCausalLM",
    parameters=1_000_000,
    context_length=100,
    experts=(EXPERTS,) * LAYERS,
    experts_per_token=(TOP_K,) * LAYERS,
    expert_read_bytes=1_000_000,
    expert_slot_bytes=2_000_000,
    dense_bytes=10_000_000,
    head_bytes=5_000_000,
    state_bytes_per_token=1000,
    schemes={"experts": "int4", "head": "int8"},
)


def run(slots: int, **changes: Any) -> Run:
    """A run in which a step takes 10 ms: 4 of attention and head, 2 of experts, 1 of Python, 3 of waiting."""
    changes.setdefault("decode_tokens_per_s", 1 / changes.get("step_median_s", 0.01))
    made = Run(
        memory=f"{slots} slots",
        memory_budget_bytes=100_000_000 + 2_000_000 * slots,
        limited_by="cgroup",
        peak_memory_bytes=100_000_000,
        expert_slots=slots,
        expert_share=slots / (LAYERS * EXPERTS),
        start_s=1.0,
        ttft_s=0.5,
        prefill_tokens_per_s=20.0,
        decode_tokens_per_s=100.0,
        mean_tokens_per_s=100.0,
        step_median_s=0.01,
        step_p95_s=0.02,
        step=Step(mean_s=0.01, segments=0.4, experts=0.2, waiting=0.3, python=0.1),
        hit_rate=0.5,
        prefetch_hit_rate=0.0,
        misses_per_token=2.0,
        prompt_reads=10,
        bytes_read=30_000_000,
        bytes_read_per_token=2e6,
        bytes_prefetched=0,
        prefetch_precision=0.0,
        load_s=0.002,
        read_one_s=0.002,
        read_more_s=0.001,
        major_faults=0,
        tokens_sha256="cd" * 32,
        backend="slots",
        threads=2,
        measured_at="2026-11-24T08:00:00+00:00",
    )
    return msgspec.structs.replace(made, **changes)


def point(slots: int, *visits: int) -> CachePoint:
    missed = sum(n * count for n, count in enumerate(visits))
    rate = 1 - missed / (TOP_K * sum(visits))
    return CachePoint(
        expert_slots=slots,
        expert_share=slots / (LAYERS * EXPERTS),
        hit_rate=rate,
        lru_hit_rate=rate / 2,
        belady_hit_rate=(1 + rate) / 2,
        prompt_reads=10,
        visits_by_misses=visits,
    )


def profile(*runs: Run, **changes: Any) -> Profile:
    """A curve in which layers miss both experts with 2 slots, one with 8, none with 16."""
    made = Profile(
        machine=Machine(
            cpu="Made-up CPU",
            architecture="x86_64",
            features=("avx2",),
            cores=2,
            memory_bytes=16 * 10**9,
            ram_one_thread_bytes_per_s=10e9,
            ram_bytes_per_s=20e9,
            disk=(ReadSpeed(block_bytes=1 << 20, in_flight=2, bytes_per_s=1e9),),
        ),
        model=MODEL,
        memory=Memory(fixed_bytes=100_000_000, loading_bytes=1_000_000, least_bytes=104_000_000),
        workload=Workload(source="seeded tokens", prompt_tokens=10, output_tokens=TOKENS, prompt_sha256="ef" * 32),
        settings=Settings(threads=2, prefetch="off"),
        expert=ExpertCosts(read_one_s=0.002, read_more_s=0.001, check_s=0.001, slot_s=0.001),
        routing=Routing(
            counts=((12, 8, 6, 5, 4, 3, 2, 2),) * LAYERS,
            entropy=0.9,
            hottest_quarter=0.5,
            repeated=0.3,
            new_experts=1,
            prompt_visits=2,
            prompt_experts=12,
            curve=(point(2, 0, 0, 20), point(8, 0, 20), point(16, 20)),
        ),
        runs=runs or (run(2), run(16)),
    )
    return msgspec.structs.replace(made, **changes)
