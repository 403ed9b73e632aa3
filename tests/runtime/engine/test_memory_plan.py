"""The memory plan in figures: what is fixed, what is the least, and how many slots and chunks the rest pays for."""

# pyright: reportArgumentType=false

from __future__ import annotations

import msgspec
import numpy as np
import onnx
import onnx.parser
import pytest

from pocketmoe.bundle.manifest import DenseTensor, ExpertKind, FileEntry, Manifest, MoeLayer, Segment, State, Tensor
from pocketmoe.errors import BudgetTooSmall
from pocketmoe.ort import Session, session_options
from pocketmoe.runtime.engine import claims
from pocketmoe.runtime.engine.claims import bytes_while_loading, fit_chunks, open_budget
from pocketmoe.runtime.engine.memory_plan import Load, MemoryRequest, ModelSizes
from pocketmoe.runtime.engine.opening import segment_threads
from tests import bundles

PROCESS = 50_000_000
SMALL = Load(24, 24)
LONG = Load(2048, 128)


def made_up(layers: int, hidden: int, vocab: int, records: tuple[int, ...], tied: bool = False) -> Manifest:
    """`layers` layers of 8 experts, two of them for a token, of as many kinds as there are `records`, in bytes."""
    plain = bundles.manifest()
    moe = tuple(
        MoeLayer(n_experts=8, top_k=2, x=f"x{i}", expert_ids=f"i{i}", expert_weights=f"w{i}", output=f"y{i}")
        for i in range(layers)
    )
    segments = tuple(Segment(graph=f"graphs/s{i}.onnx", inputs=(), outputs=()) for i in range(layers + 1))
    kinds = tuple(
        ExpertKind(
            graph="graphs/e.onnx",
            input="x",
            output="y",
            nbytes=nbytes,
            tensors=(Tensor(name="w", dtype="uint8", shape=(nbytes,), offset=0, nbytes=nbytes),),
        )
        for nbytes in records
    )
    roles = {"embedding": 4 * vocab * hidden, "attention": 4 * hidden * hidden}
    roles |= {} if tied else {"head": vocab * hidden}
    dense = tuple(
        DenseTensor(name=role, role=role, dtype="uint8", shape=(nbytes,), offset=0, nbytes=nbytes)
        for role, nbytes in roles.items()
    )
    states = (
        State(input="k", output="k1", dtype="float32", shape=(1, 4, -1, hidden // 4), growing_axis=2, in_place=True),
        State(input="s", output="s1", dtype="float32", shape=(1, 64), growing_axis=None),
    )
    files = {segment.graph: FileEntry(nbytes=10_000, sha256="0" * 64) for segment in segments}
    model = msgspec.structs.replace(plain.model, hidden_size=hidden, vocab_size=vocab, attention_heads=4)
    return msgspec.structs.replace(
        plain,
        model=model,
        moe_layers=moe,
        segments=segments,
        expert_kinds=kinds,
        dense=dense,
        states=states,
        files=files,
    )


TINY = made_up(2, 64, 512, (24_576,))
TIED = made_up(2, 64, 512, (24_576, 40_000), tied=True)
LARGE = made_up(16, 2048, 50_304, (3_600_000,))


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this process and its stacks take, the plan is told the same."""
    monkeypatch.setattr(claims, "process_bytes", lambda: PROCESS)
    monkeypatch.setattr(claims, "stack_bytes", lambda threads: threads * (8 << 20))


def least(manifest: Manifest, load: Load) -> int:
    with pytest.raises(BudgetTooSmall) as refusal:
        open_budget(MemoryRequest(total_bytes=1), manifest, load)
    return refusal.value.least_bytes


# dense weights, states, activations, slot scratch, loading; the least budget; what may be reserved on 1 and 4 threads
PLANS = [
    (TINY, SMALL, (2_345_139, 6_912, 251_904, 147_456, 393_216), 80, (21_505_075, 21_505_075)),
    (TINY, LONG, (2_345_139, 525_056, 26_161_152, 147_456, 393_216), 106, (47_932_467, 47_932_467)),
    (TIED, SMALL, (2_322_201, 6_912, 251_904, 240_000, 640_000), 80, (21_755_929, 21_755_929)),
    (TIED, LONG, (2_322_201, 525_056, 26_161_152, 240_000, 640_000), 107, (48_183_321, 48_183_321)),
    (LARGE, SMALL, (144_216_396, 197_376, 7_160_832, 21_600_000, 103_022_592), 324, (1_357_977_548, 1_785_796_556)),
    (LARGE, LONG, (160_797_004, 16_777_984, 57_830_400, 21_600_000, 103_022_592), 357, (1_441_808_332, 1_869_627_340)),
]


@pytest.mark.parametrize(("manifest", "load", "parts", "least_mb", "reserved"), PLANS)
def test_the_fixed_part_and_the_least_budget(
    manifest: Manifest, load: Load, parts: tuple[int, ...], least_mb: int, reserved: tuple[int, int]
) -> None:
    """To the byte; the least budget as it is told, in whole megabytes."""
    budget = open_budget(MemoryRequest(expert_share=0.0), manifest, load)
    names = ("process", "onnxruntime", "dense weights", "states", "activations", "slot scratch", "loading")
    assert budget.claims == dict(zip(names, (PROCESS + 4_000_000, 18_000_000, *parts), strict=True))
    assert least(manifest, load) == least_mb * 10**6
    assert tuple(bytes_while_loading(budget, ModelSizes.of(manifest), threads) for threads in (1, 4)) == reserved


@pytest.mark.parametrize("sequences", [2, 5])
def test_each_text_has_its_states_and_snapshots(sequences: int) -> None:
    """Two states, one of 64 floats that does not grow: it is there once, in each snapshot, and as it was before a step.

    The copy that a step makes of a state is made of one text at a time.
    """
    one = open_budget(MemoryRequest(expert_share=0.0), TINY, Load(24, 24, snapshots=1)).claims
    load = Load(24, 24, snapshots=3, sequences=sequences)
    several = open_budget(MemoryRequest(expert_share=0.0), TINY, load).claims
    fixed, cache, copied = 4 * 64, 4 * 64 * 24, 2 * 4 * 64
    assert one["states"] == cache + fixed + copied + fixed
    assert several["states"] == sequences * (cache + fixed + (3 + 1) * fixed) + copied
    each = 4 * (64 * (2 + 8) + 2 * 512) + 128 * 24 + 1_000_000
    assert several["activations"] == one["activations"] + (sequences - 1) * each
    assert {name: several[name] for name in several if name not in ("states", "activations")} == {
        name: one[name] for name in one if name not in ("states", "activations")
    }
    assert least(TINY, load) > least(TINY, Load(24, 24, snapshots=1))


@pytest.mark.parametrize(
    ("manifest", "load", "chunks", "chunks_of_a_share"),
    [(TINY, SMALL, 1, 1), (TINY, LONG, 8, 1), (LARGE, SMALL, 1, 1), (LARGE, LONG, 8, 3)],
)
def test_chunks_go_together_for_a_tenth_of_what_is_left(
    manifest: Manifest, load: Load, chunks: int, chunks_of_a_share: int
) -> None:
    """Of 2 GB; and of half of the experts, which the share is told on top."""
    for request, wanted in (
        (MemoryRequest(total_bytes=2 * 10**9), chunks),
        (MemoryRequest(expert_share=0.5), chunks_of_a_share),
    ):
        budget = open_budget(request, manifest, load)
        before = budget.total_bytes
        assert fit_chunks(budget, request, ModelSizes.of(manifest), load) == wanted
        more = budget.claims["chunks together"]
        assert more == (wanted - 1) * 4 * load.chunk * manifest.model.hidden_size * 10
        assert budget.total_bytes == before + (more if request.expert_share else 0)


@pytest.mark.parametrize(("threads", "heads", "wanted"), [(16, 4, 4), (3, 4, 3), (16, 0, 16)])
def test_segments_run_on_no_more_threads_than_heads(threads: int, heads: int, wanted: int) -> None:
    """Of large weights, which are worth any number of threads; without a number of heads that is known, on all."""
    manifest = made_up(2, 8192, 50_000, (1000,))
    manifest = msgspec.structs.replace(manifest, model=msgspec.structs.replace(manifest.model, attention_heads=heads))
    assert segment_threads(threads, ModelSizes.of(manifest)) == wanted


def test_attention_has_the_same_bits_on_as_many_threads_as_heads() -> None:
    """A decode step of 4 heads after 3,000 tokens. On more threads than heads ONNX Runtime sums otherwise."""
    heads, width, past = 4, 32, 3000
    graph = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        attend (float[1, 1, {heads * width}] q, float[1, 1, {heads * width}] k, float[1, 1, {heads * width}] v,
                float[1, {heads}, {past}, {width}] keys, float[1, {heads}, {past}, {width}] values,
                int32[1] last, int32 total) => (float[1, 1, {heads * width}] y)
        {{
            y, new_keys, new_values = com.microsoft.GroupQueryAttention
                <num_heads = {heads}, kv_num_heads = {heads}> (q, k, v, keys, values, last, total)
        }}"""
    )
    rng = np.random.default_rng(0)
    shapes = dict.fromkeys("qkv", (1, 1, heads * width)) | dict.fromkeys(("keys", "values"), (1, heads, past, width))
    feed: dict[str, np.ndarray] = {n: rng.standard_normal(shape, dtype=np.float32) for n, shape in shapes.items()}
    feed |= {"last": np.array([past], np.int32), "total": np.array(past + 1, np.int32)}
    found = [
        Session(graph.SerializeToString(), session_options(threads), "attend").run(["y"], feed)[0]
        for threads in (1, 2, 3, 4)
    ]
    assert all(np.array_equal(found[0], y) for y in found[1:])
