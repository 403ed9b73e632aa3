"""What a model takes of memory, in figures: what is fixed, and how many expert slots and chunks the rest pays for.

The fixed part is reckoned before anything is loaded, so that a budget too small is refused instead of overrun. Each
figure is an upper bound; tests hold the sum to what is used. The engine asks with the sizes of its bundle (`claims`),
estimates ask with those of a model that nobody has loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pocketmoe.bundle.manifest import Manifest
from pocketmoe.bundle.store import PAGE, padded
from pocketmoe.sizes import parse_share, parse_size

CHUNK = 128  # tokens of a prompt that are computed together; a constant, so that no budget changes a bit
LEAST_SLOTS = 2  # of an expert kind: one computes while the other is filled
_KERNEL_SHARE = 0.02  # of slots, beyond the first 256 MB of them
_WITHOUT_KERNEL_SHARE = 256 * 10**6
_MB = 10**6
USUAL_PROCESS_BYTES = 62 * _MB  # Python, numpy, tokenizers and what else is there before a model
_UNFORESEEN = 4 * _MB  # page tables of the kernel's, allocator slack, threads' stacks
_ONNXRUNTIME = 18 * _MB  # its code and tables that the first session and the first run touch; 14 MB and 4.5 MB measured
_SESSION = 700_000  # a segment's session beyond its weights, measured on onnxruntime 1.32
_SLOT_OVERHEAD = 192 * 1024  # a slot's session and the rounding to pages
_SLOT_SCRATCH = 2 * 3  # expert records: each of two readers may be making a slot, which holds three for a moment
_PACK_SCRATCH = 2 * 8  # expert records: packing works on two experts, and holds eight records for each for a moment
ID_BYTES = 128  # of a token's id, in three lists
_CALLER = 1 * _MB  # a thread's stack, and what the C library keeps for it
_MOST_CHUNKS = 8  # beyond, reading is a small part of a prompt's time


@dataclass(frozen=True)
class MemoryRequest:
    """What the user asked for: bytes for the whole process, or a share of the expert bytes on top of the fixed part."""

    total_bytes: int | None = None
    expert_share: float | None = None

    @classmethod
    def parse(cls, text: str | None) -> MemoryRequest:
        """`800MB`, `1.5GiB`, `40%`, or None for what is free. Raises ValueError."""
        if text is None:
            return cls()
        share = parse_share(text)
        return cls(expert_share=share) if share is not None else cls(total_bytes=parse_size(text))


@dataclass(frozen=True)
class Load:
    """What a run will ask of memory."""

    capacity: int  # tokens of text
    chunk: int  # tokens of a prompt that are computed together
    snapshots: int = 0  # copies of each text's states that do not grow, for texts that begin alike
    sequences: int = 1  # texts at once
    beside_bytes: int = 0  # what the rest of the process will come to take beyond what it has

    @classmethod
    def of_text(cls, tokens: int, chunk: int = CHUNK, snapshots: int = 0, sequences: int = 1) -> Load:
        """Of texts of so many tokens each, prompt and answer."""
        return cls(tokens, min(chunk, tokens), snapshots, sequences)

    @property
    def rolls_back(self) -> bool:
        """Whether a step that fails leaves each text as it was, so that the others can go on."""
        return self.sequences > 1


@dataclass(frozen=True)
class ModelSizes:
    """What of a model decides how much memory it takes.

    An embedding of its own is `mapped`: it stays a file of which each token touches a row. All other dense weights are
    `resident`, in memory as a whole.
    """

    segments: int
    routers: int
    graph_bytes: int  # of all segments
    resident_bytes: int
    largest_resident_bytes: int  # of one tensor
    mapped_bytes: tuple[int, ...]  # by tensor
    expert_bytes: tuple[int, ...]  # the longest record of each expert kind
    experts: int  # of all layers together
    top_k: int  # of the layer with most
    hidden_size: int
    attention_heads: int
    vocab_size: int

    @classmethod
    def of(cls, manifest: Manifest) -> ModelSizes:
        """Of a bundle."""
        tied = not any(tensor.role == "head" for tensor in manifest.dense)
        resident = [tensor.nbytes for tensor in manifest.dense if tied or tensor.role != "embedding"]
        mapped = [tensor.nbytes for tensor in manifest.dense if not tied and tensor.role == "embedding"]
        return cls(
            segments=len(manifest.segments),
            routers=sum(1 for layer in manifest.moe_layers if layer.router),
            graph_bytes=sum(manifest.files[segment.graph].nbytes for segment in manifest.segments),
            resident_bytes=sum(resident),
            largest_resident_bytes=max(resident, default=0),
            mapped_bytes=tuple(mapped),
            expert_bytes=tuple(kind.nbytes for kind in manifest.expert_kinds),
            experts=sum(layer.n_experts for layer in manifest.moe_layers),
            top_k=max((layer.top_k for layer in manifest.moe_layers), default=0),
            hidden_size=manifest.model.hidden_size,
            attention_heads=manifest.model.attention_heads,
            vocab_size=manifest.model.vocab_size,
        )

    @property
    def dense_bytes(self) -> int:
        return self.resident_bytes + sum(self.mapped_bytes)

    @property
    def loading_bytes(self) -> int:
        """What only loading takes, before there are slots: packing and the self-test first, then the plain bytes of
        the dense weight that is being packed.
        """
        return max(_PACK_SCRATCH * max(self.expert_bytes), self.largest_resident_bytes)


@dataclass(frozen=True)
class FixedPart:
    """What everything but the experts takes, in bytes."""

    process: int
    onnxruntime: int
    dense_weights: int
    states: int
    activations: int  # while tokens are computed, not while loading
    slot_scratch: int  # likewise
    loading: int  # while loading only

    @property
    def without_loading(self) -> int:
        """All that is there once loading is over."""
        always = self.process + self.onnxruntime + self.dense_weights + self.states
        return always + self.activations + self.slot_scratch

    def least_bytes(self, slot_bytes: int) -> int:
        """The least budget of a process whose least slots take `slot_bytes`."""
        running = self.activations + self.slot_scratch
        return peak_bytes(self.without_loading - running, self.loading, running + slot_bytes)


def fixed_part(model: ModelSizes, load: Load, *, state_bytes: int, process_bytes: int) -> FixedPart:
    """`state_bytes`: KV caches and recurrent states at the load's capacity. `process_bytes`: what it takes already."""
    rows = sum(min(nbytes, 2 * PAGE * load.capacity) for nbytes in model.mapped_bytes)
    packed = int(1.1 * model.resident_bytes)  # in place, or packed, which for int4 takes a little more
    return FixedPart(
        process=process_bytes + _UNFORESEEN + load.beside_bytes,
        onnxruntime=_ONNXRUNTIME,
        dense_weights=packed + rows + 2 * model.graph_bytes + _SESSION * model.segments,
        states=state_bytes,
        activations=_activation_bytes(model, load),
        slot_scratch=_SLOT_SCRATCH * max(model.expert_bytes),
        loading=model.loading_bytes,
    )


def _activation_bytes(model: ModelSizes, load: Load) -> int:
    """Values between operators at their widest: hidden rows, expert outputs, attention scores, one row of logits."""
    rows = min(load.chunk, load.capacity)
    hidden = rows * model.hidden_size * (24 + 3 * model.top_k)
    scores = 3 * rows * load.capacity * (model.attention_heads + 4)
    return 4 * (hidden + scores + 6 * model.vocab_size) + (load.sequences - 1) * _bytes_per_further_text(model, load)


def _bytes_per_further_text(model: ModelSizes, load: Load) -> int:
    """What one more text takes beside its states: its token's values, its logits, ids in lists, who waits for it."""
    return 4 * (model.hidden_size * (model.top_k + 8) + 2 * model.vocab_size) + ID_BYTES * load.capacity + _CALLER


def peak_bytes(always_bytes: int, loading_bytes: int, running_bytes: int) -> int:
    """What a process takes at its peak. Loading is over before slots are made: the two never need memory at once."""
    return always_bytes + max(loading_bytes, running_bytes)


def slot_bound(record_bytes: int) -> int:
    """What one slot takes at most, whatever the backend: a session's own record, its packed copy, its bookkeeping."""
    return padded(record_bytes * 5 // 2) + _SLOT_OVERHEAD


def usual_slot_bytes(record_bytes: int) -> int:
    """What one slot takes that is rewritten in place: its record, its bookkeeping."""
    return padded(record_bytes) + _SLOT_OVERHEAD


def slot_share(available: int, all_bytes: int) -> float:
    """The share of the experts whose slots fit into `available` bytes, where those of all take `all_bytes`.

    What the kernel keeps of many slots' pages is not in a process's own figures, and a cgroup counts it. Without room
    for that it drops the pages of weights and libraries: with 3 GB of slots in a cgroup of just the budget a token of
    Qwen3-30B-A3B's shape had 50 major faults and took 0.83 s, with 60 MB more one fault and 0.29 s.
    """
    return (available - int(_KERNEL_SHARE * max(0, available - _WITHOUT_KERNEL_SHARE))) / all_bytes


def possible_slots(wanted: int, experts: int) -> int:
    """How many slots a kind of `experts` experts gets where `wanted` are asked for: at least two, at most one each."""
    return min(experts, max(LEAST_SLOTS, wanted))


def slots_by_kind(share: float, experts: Mapping[int, int]) -> dict[int, int]:
    """How many slots each expert kind gets: the same share of its experts, of which it has `experts`."""
    return {kind: possible_slots(int(share * count), count) for kind, count in experts.items()}


def bytes_per_further_chunk(model: ModelSizes, load: Load) -> int:
    """What one more chunk of a prompt takes that goes through the layers together with others.

    Experts' outputs; values between segments.
    """
    return 4 * load.chunk * model.hidden_size * (model.top_k + 8)


def chunks_together(model: ModelSizes, load: Load, available_bytes: int) -> int:
    """How many chunks of a prompt go through the layers together, so that an expert is read once for all of them.

    As many as the text has, at most `_MOST_CHUNKS`, for a tenth of what is available for the experts.
    """
    wanted = min(_MOST_CHUNKS, -(-load.capacity // load.chunk))
    return 1 + max(0, min(wanted - 1, available_bytes // 10 // bytes_per_further_chunk(model, load)))
