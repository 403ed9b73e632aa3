"""The memory plan's sums against a plain reading of what each of them promises, whatever the sizes."""

from __future__ import annotations

import math
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketmoe.bundle.store import PAGE
from pocketmoe.runtime.engine.memory_plan import (
    CHUNK,
    Load,
    MemoryRequest,
    ModelSizes,
    bytes_per_further_chunk,
    chunks_together,
    fixed_part,
    peak_bytes,
    possible_slots,
    slot_bound,
    slots_by_kind,
    usual_slot_bytes,
)
from tests.runtime.engine.test_memory_plan import made_up

BYTES = st.integers(0, 10**12)
LOADS = st.builds(Load, st.integers(1, 10**5), st.integers(1, 512), sequences=st.integers(1, 16))
SIZES = st.builds(
    ModelSizes,
    segments=st.integers(1, 100),
    routers=st.integers(0, 99),
    graph_bytes=st.integers(0, 10**7),
    resident_bytes=BYTES,
    largest_resident_bytes=st.integers(0, 10**9),
    mapped_bytes=st.lists(st.integers(0, 10**9), max_size=2).map(tuple),
    expert_bytes=st.lists(st.integers(1, 10**8), min_size=1, max_size=3).map(tuple),
    experts=st.integers(1, 20_000),
    top_k=st.integers(0, 16),
    hidden_size=st.integers(1, 8192),
    attention_heads=st.integers(0, 128),
    vocab_size=st.integers(1, 300_000),
)


def pages(nbytes: int) -> int:
    return math.ceil(nbytes / PAGE) * PAGE


@given(SIZES, LOADS, BYTES, BYTES)
def test_the_fixed_part_is_the_sum_of_what_it_names(model: ModelSizes, load: Load, states: int, process: int) -> None:
    """Each part from the sizes alone: nothing is forgotten, and nothing is counted twice."""
    fixed = fixed_part(model, load, state_bytes=states, process_bytes=process)
    rows = sum(min(nbytes, 2 * PAGE * load.capacity) for nbytes in model.mapped_bytes)
    assert fixed.process == process + 4_000_000
    assert fixed.onnxruntime == 18_000_000
    assert fixed.dense_weights - rows - 2 * model.graph_bytes - 700_000 * model.segments == int(
        1.1 * model.resident_bytes
    )
    assert fixed.states == states
    tokens = min(load.chunk, load.capacity)
    floats = tokens * model.hidden_size * (24 + 3 * model.top_k)  # hidden rows, experts' outputs
    floats += 3 * tokens * load.capacity * (model.attention_heads + 4)  # scores
    floats += 6 * model.vocab_size  # a row of logits
    further = model.hidden_size * (model.top_k + 8) + 2 * model.vocab_size  # a token's values, its row of logits
    assert fixed.activations == 4 * floats + (load.sequences - 1) * (4 * further + 128 * load.capacity + 1_000_000)
    assert fixed.slot_scratch == 6 * max(model.expert_bytes)
    assert fixed.loading == max(16 * max(model.expert_bytes), model.largest_resident_bytes)
    parts = (fixed.process, fixed.onnxruntime, fixed.dense_weights, fixed.states)
    assert fixed.without_loading == sum(parts) + fixed.activations + fixed.slot_scratch


@given(SIZES, LOADS, BYTES)
def test_loading_and_running_have_the_same_memory_one_after_the_other(
    model: ModelSizes, load: Load, slots: int
) -> None:
    """The least budget is what the larger of the two takes beside what is always there."""
    fixed = fixed_part(model, load, state_bytes=5, process_bytes=7)
    always = fixed.process + fixed.onnxruntime + fixed.dense_weights + fixed.states
    while_loading, while_running = always + fixed.loading, fixed.without_loading + slots
    assert fixed.least_bytes(slots) == max(while_loading, while_running)
    assert peak_bytes(always, fixed.loading, 0) == while_loading


@given(SIZES, LOADS, BYTES)
def test_more_of_anything_takes_no_less(model: ModelSizes, load: Load, states: int) -> None:
    """So that a budget that does for a long text does for a short one."""
    small = fixed_part(model, load, state_bytes=states, process_bytes=0).least_bytes(0)
    longer = replace(load, capacity=load.capacity + 1)
    assert fixed_part(model, longer, state_bytes=states, process_bytes=0).least_bytes(0) >= small
    more = replace(load, sequences=load.sequences + 1)
    assert fixed_part(model, more, state_bytes=states, process_bytes=0).least_bytes(0) >= small
    larger = replace(model, vocab_size=model.vocab_size + 1, segments=model.segments + 1)
    assert fixed_part(larger, load, state_bytes=states, process_bytes=0).least_bytes(0) > small


@given(SIZES, LOADS, st.integers(-(10**9), 10**12))
def test_as_many_chunks_go_together_as_a_tenth_pays_for(model: ModelSizes, load: Load, available: int) -> None:
    """The most, up to eight and to those that the text has, whose further ones cost a tenth of what there is."""
    each = bytes_per_further_chunk(model, load)
    assert each == 4 * load.chunk * model.hidden_size * (model.top_k + 8)
    of_text = math.ceil(load.capacity / load.chunk)
    affordable = [n for n in range(1, min(8, of_text) + 1) if 10 * (n - 1) * each <= max(0, available)]
    assert chunks_together(model, load, available) == max(affordable)


@given(st.floats(0, 2), st.dictionaries(st.integers(0, 5), st.integers(1, 500), max_size=4))
def test_each_kind_has_the_same_share_of_slots(share: float, experts: dict[int, int]) -> None:
    """But two at least, so that one is filled while the other computes, and never more than experts."""
    slots = slots_by_kind(share, experts)
    assert slots == {kind: possible_slots(int(share * count), count) for kind, count in experts.items()}
    for kind, count in experts.items():
        assert min(2, count) <= slots[kind] <= count
        assert slots[kind] == min(count, int(share * count)) or slots[kind] == min(2, count)


def test_few_slots() -> None:
    assert [possible_slots(wanted, 5) for wanted in (0, 1, 2, 3, 5, 6)] == [2, 2, 2, 3, 5, 5]
    assert possible_slots(0, 1) == 1


@given(st.integers(1, 10**9))
def test_what_a_slot_takes(record: int) -> None:
    """A mapped slot its pages; a session its record and one and a half times that, packed. Both keep books."""
    assert usual_slot_bytes(record) == pages(record) + 196_608
    assert slot_bound(record) == pages(record * 5 // 2) + 196_608


def test_a_load_is_a_text_in_chunks() -> None:
    """Of a text shorter than a chunk, one chunk of it."""
    assert CHUNK == 128
    assert [Load.of_text(tokens) for tokens in (5, 128, 300)] == [Load(5, 5), Load(128, 128), Load(300, 128)]
    assert Load.of_text(300, 64) == Load(300, 64)


@pytest.mark.parametrize(
    ("text", "request_"),
    [
        (None, MemoryRequest()),
        ("800MB", MemoryRequest(total_bytes=800_000_000)),
        ("1.5GiB", MemoryRequest(total_bytes=3 << 29)),
        ("40%", MemoryRequest(expert_share=0.4)),
    ],
)
def test_what_is_asked_for(text: str | None, request_: MemoryRequest) -> None:
    assert MemoryRequest.parse(text) == request_


def test_the_sizes_of_a_bundle_without_dense_weights_or_layers() -> None:
    """Nothing is taken for nothing, and a router that prefetch asks is one session."""
    whole = made_up(2, 64, 512, (100,))
    none = ModelSizes.of(msgspec.structs.replace(whole, dense=(), moe_layers=()))
    assert (none.largest_resident_bytes, none.resident_bytes, none.top_k, none.experts, none.routers) == (0, 0, 0, 0, 0)
    first, second = whole.moe_layers
    routed = msgspec.structs.replace(whole, moe_layers=(first, msgspec.structs.replace(second, router="graphs/r.onnx")))
    assert ModelSizes.of(routed).routers == 1
