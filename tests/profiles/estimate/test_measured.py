"""Costs of a step from what was measured of computing, with figures whose arithmetic can be done by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import msgspec
import pytest

from pocketmoe.profiles.estimate.classes import Machine, Moved, class_costs, uncertainty
from pocketmoe.profiles.estimate.measured import step_costs
from pocketmoe.profiles.estimate.step import decode_step, visits_at
from pocketmoe.profiles.profile import Computing, LayerCosts, Products

LAYER = LayerCosts(
    near_segment_s=1e-4,
    near_expert_s=1e-5,
    near_python_s=1e-4,
    far_segment_s=2e-4,
    far_expert_s=2e-5,
    far_python_s=3e-4,
    miss_s=2e-4,
    long_miss_s=1e-4,
    long_wait_s=5e-4,
)


def products(what: str, scheme: str, threads: int, far: float) -> Products:
    return msgspec.convert(
        {
            "what": what,
            "scheme": scheme,
            "threads": threads,
            "near_bytes_per_s": 2 * far,
            "far_bytes_per_s": far,
            "busy_cpus": float(threads),
        },
        Products,
    )


COMPUTING = Computing(
    products=tuple(
        products(what, scheme, threads, rate * threads)
        for what, scheme, rate in (
            ("experts", "int4-b64-asym", 8e9),
            ("experts", "int8-b64", 10e9),
            ("experts", "nf4-b64", 1e9),
            ("dense", "int8-b64", 10e9),
            ("caches", "fp32", 4e9),
        )
        for threads in (1, 2)
    ),
    layer=LAYER,
    pace_s=1e-4,
    spread=1.2,
)
MACHINE = Machine(
    name="this",
    title="made up",
    memory_bytes=16e9,
    usable_bytes=16e9,
    memory_bytes_per_s=20e9,
    int8_ops_per_s=1e12,
    instructions="amx",
    disk=((1e5, 1e9),),
    disk_alone=((1e5, 0.5e9),),
    basis="measured",
    measured=True,
    computing=COMPUTING,
    threads=2,
    cores=2.0,
)
INT4_BITS = 4 + (32 + 4) / 64
EXPERT = 3 * 2048 * 1024 * INT4_BITS / 8  # bytes of one like those that were measured
LARGE = Moved(
    layers=4,
    top_k=8,
    dense_bytes=200e6,
    head_bytes=100e6,
    dense_bits=8.5,
    expert_bytes=EXPERT,
    expert_bits=INT4_BITS,
    read_bytes=EXPERT,
    kv_bytes=8e6,
)


def test_a_large_model_takes_what_its_weights_do_from_memory() -> None:
    """Two threads for both kinds of weights; a call of an expert is in the time of those that were measured."""
    costs = step_costs(MACHINE, LARGE)
    weights_s = 200e6 / 20e9 + 8e6 / 8e9
    assert costs.steady.experts_s == pytest.approx(32 * EXPERT / 16e9)
    assert costs.steady.segments_s == pytest.approx(5 * 2e-4 + weights_s)
    assert costs.steady.python_s == pytest.approx(4 * 3e-4)
    assert costs.after_waits.experts_s == pytest.approx(32 * EXPERT / 8e9), "each that arrives is computed alone"
    assert (costs.read_one_s, costs.read_more_s) == pytest.approx((EXPERT / 0.5e9, EXPERT / 1e9))


def test_a_small_model_takes_what_a_layer_does() -> None:
    """All of it from the caches, on one thread, its experts' calls counted; the pace scales them."""
    moved = Moved(6, 4, 2e6, 1e6, 8.5, 30_000.0, INT4_BITS, 40_000.0)
    costs, slow = step_costs(MACHINE, moved), step_costs(MACHINE, moved, pace=1.5)
    assert costs.steady.python_s == pytest.approx(6e-4)
    assert costs.steady.segments_s == pytest.approx(7e-4 + 2e6 / 20e9)
    calls_s = 24 * 1e-5 * (1 - 30_000 / EXPERT)
    assert costs.steady.experts_s == pytest.approx(24 * 30_000 / 16e9 + calls_s)
    assert slow.steady.total_s == pytest.approx(1.5 * costs.steady.total_s)
    missed_s = costs.after_waits.python_s - costs.steady.python_s
    assert 24 * 2e-4 < missed_s < 24 * 3e-4, "each that is read costs more, and more after a longer read"


def test_formats_count_by_what_is_most_alike() -> None:
    """Four-bit floats by theirs; two bits take as long a weight as four."""
    nf4 = step_costs(MACHINE, Moved(4, 8, 200e6, 0, 8.5, EXPERT, 4.5, EXPERT, float4=True))
    int2 = step_costs(MACHINE, Moved(4, 8, 200e6, 0, 8.5, EXPERT / 2, INT4_BITS / 2, EXPERT))
    assert nf4.steady.experts_s == pytest.approx(32 * EXPERT / 2e9)
    assert int2.steady.experts_s == pytest.approx(step_costs(MACHINE, LARGE).steady.experts_s)


def test_a_quota_lets_through_what_it_lets_through() -> None:
    """Of two threads on the time of one CPU: as long as all their work takes one, unless the disk takes longer."""
    whole, half = step_costs(MACHINE, LARGE), step_costs(replace(MACHINE, cores=1.0), LARGE)
    all_there, none_there = visits_at(1.0, 8), visits_at(0.0, 8)
    assert decode_step(LARGE.work, whole, all_there).total_s == pytest.approx(whole.steady.total_s)
    busy_s = 2 * (half.steady.segments_s + half.steady.experts_s) + half.steady.python_s
    assert decode_step(LARGE.work, half, all_there).total_s == pytest.approx(busy_s)
    waiting = decode_step(LARGE.work, half, none_there)
    assert waiting.total_s == pytest.approx(decode_step(LARGE.work, whole, none_there).total_s)


def test_what_was_not_measured_goes_by_class() -> None:
    """Nothing of computing, or weights that are not quantized."""
    unknown = replace(MACHINE, computing=None)
    assert step_costs(unknown, LARGE) == class_costs(unknown, LARGE)
    plain = replace(LARGE, expert_bits=32, dense_bits=32)
    assert step_costs(MACHINE, plain) == class_costs(MACHINE, plain)
    changing = replace(MACHINE, computing=msgspec.structs.replace(COMPUTING, spread=1.7))
    assert (uncertainty(MACHINE), uncertainty(changing)) == (1.15, pytest.approx(math.sqrt(1.7)))


def test_a_slower_disk_is_slower_for_every_read() -> None:
    slow = MACHINE.with_disk(1e8)
    assert slow.reads_s(1e6) == (0.01, 0.01)
    assert MACHINE.with_disk(1e12) == MACHINE
