"""Ways to read fewer bytes for missing experts, at equal memory for experts: what each costs in KL and saves.

    python benchmarks/fewer_bytes.py REFERENCE BASE LOW TEXTS [--mixed BUNDLE ...] [--memory 25%] [--tokens N]

REFERENCE is the bundle in float32, BASE the one to be improved (int4, say), LOW the same with experts of fewer bits
(int2). Each held-out text is a prompt of 64 tokens and then decoded token by token, as given. Memory is that share of
BASE's experts in bytes for all rows; reads are in units of one of BASE's experts.

    exact           BASE as it is
    prefer, drop    BASE with --prefer-cached, --drop-cold of that strength
    copies          a missing expert that weighs less than that share of its token's mean is read and computed in LOW,
                    and kept in a part of the memory of its own (HOBBIT, arXiv 2411.01433); simulated: experts' outputs
                    are replaced, misses counted by the cache's own policy
    mixed           other bundles as they are, and their experts with BASE's dense part, simulated likewise
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import ExpertId
from pocketmoe.profiles.quality.quality import read_slices
from pocketmoe.runtime.backends.sessions import expert_from_record
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.paging.cache import ExpertCache
from pocketmoe.runtime.tokenizer import Text

PROMPT = 64
STRENGTHS = {"prefer_cached": (0.05, 0.1, 0.15, 0.25), "drop_cold": (0.5, 0.75, 1.0)}
LIGHT = (0.5, 0.75, 1.0, 1.25)  # shares of a token's mean weight
LOW_PARTS = (0.1, 0.25)  # of the memory

Texts = Sequence[Sequence[int]]


class Experts:
    """All experts of a bundle, a session each."""

    def __init__(self, bundle: Bundle) -> None:
        graphs = [bundle.path(kind.graph) for kind in bundle.manifest.expert_kinds]
        with bundle.open_store() as store:
            self._records = {expert: bytes(store.read(expert)) for expert in store.records}
            kinds = {expert: graphs[record.kind] for expert, record in store.records.items()}
        self._sessions = {
            expert: expert_from_record(kinds[expert].read_bytes(), kinds[expert], record)
            for expert, record in self._records.items()
        }
        self.mean_bytes = float(np.mean([len(record) for record in self._records.values()]))

    def run(self, expert: ExpertId, x: np.ndarray) -> np.ndarray:
        """y, float32 [width], of x, float32 [1, width]."""
        return self._sessions[expert].run(x)[0].copy()


@dataclass
class Copies:
    """Simulates experts in two precisions on an engine that has all of BASE's in memory."""

    base: Experts
    low: Experts
    high_slots: ExpertCache
    low_slots: ExpertCache | None  # None: all experts are `low`'s, in `high_slots`
    light: float = np.inf
    high_reads: int = 0
    low_reads: int = 0
    decoding: bool = field(default=False)

    def replace(self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, output: np.ndarray) -> None:
        """What `Engine.on_experts` is called with: x [tokens, width], ids and weights [tokens, top_k]."""
        for cache in filter(None, (self.high_slots, self.low_slots)):
            cache.count(layer, ids)
        keep = {ExpertId(layer, expert) for expert in np.unique(ids).tolist()}
        for token, (chosen, weight) in enumerate(zip(ids.tolist(), weights, strict=True)):
            for expert, share in zip((ExpertId(layer, number) for number in chosen), weight, strict=True):
                if self._computed_low(expert, share < self.light * weight.mean(), keep):
                    row = x[token : token + 1]
                    output[token] += share * (self.low.run(expert, row) - self.base.run(expert, row))

    def _computed_low(self, expert: ExpertId, light: bool, keep: set[ExpertId]) -> bool:
        """Whether an expert is computed in low bits; places and counts what is read for it."""
        high, low = self.high_slots, self.low_slots
        if high.slot_of(expert) is not None:
            return low is None
        if low is None or not self.decoding or not light:
            high.place(expert, keep if self.decoding else set())
            self.high_reads += self.decoding
            return low is None
        if low.slot_of(expert) is None:
            low.place(expert, keep)
            self.low_reads += 1
        return True


class Bench:
    """The texts, and what the reference says of them."""

    def __init__(self, reference: Bundle, base: Bundle, texts: Path, memory: float, tokens: int) -> None:
        tokenizer = Text(reference)
        self.texts: Texts = [tokenizer.encode(piece.text)[: PROMPT + tokens] for piece in read_slices(texts)]
        self.base, self.memory, self.experts = base, memory, Experts(base)
        self.tokens = sum(len(text) - PROMPT for text in self.texts)
        with Engine(reference, self.options(1.0)) as engine:
            self.truth = [log_softmax(logits) for logits in self.decode(engine)]

    def options(self, share: float, **more: float) -> EngineOptions:
        longest = max(len(text) for text in self.texts)
        return EngineOptions(MemoryRequest(expert_share=share), longest, prefetch="off", **more)  # type: ignore[arg-type]

    def decode(self, engine: Engine, at_answer: Callable[[bool], None] = lambda _: None) -> Iterator[np.ndarray]:
        """Logits, float32 [tokens, vocab], of each text after its prompt; told when that is over."""
        for text in self.texts:
            engine.reset()
            at_answer(False)
            engine.feed(text[:PROMPT])
            at_answer(True)
            yield np.concatenate([engine.feed([token]) for token in text[PROMPT:]])

    def row(self, name: str, logits: Iterator[np.ndarray], reads: Callable[[], float]) -> str:
        kl, same = 0.0, 0
        for found, true in zip(logits, self.truth, strict=True):
            ours = log_softmax(found)
            kl += float((np.exp(true) * (true - ours)).sum())
            same += int((ours.argmax(-1) == true.argmax(-1)).sum())
        return f"| {name} | {kl / self.tokens:.4f} | {same / self.tokens:.1%} | {reads() / self.tokens:.2f} |"

    def real(self, name: str, bundle: Bundle, mean_bytes: float, **more: float) -> str:
        """A bundle as it runs."""
        share = self.memory * self.experts.mean_bytes / mean_bytes
        with Engine(bundle, self.options(share, **more)) as engine:
            misses = [0, 0]  # in prompts, and in all

            def note(decoding: bool) -> None:
                misses[0] += engine.stats.misses - misses[1] if decoding else 0
                misses[1] = engine.stats.misses

            def reads() -> float:
                return (engine.stats.misses - misses[0]) * mean_bytes / self.experts.mean_bytes

            return self.row(name, self.decode(engine, note), reads)

    def simulated(self, name: str, low: Experts, light: float | None, low_part: float = 0.0) -> str:
        """Copies in low bits, or with `light` None all experts in them."""
        layers = {number: layer.n_experts for number, layer in enumerate(self.base.manifest.moe_layers)}
        size = low.mean_bytes / self.experts.mean_bytes
        slots = self.memory * sum(layers.values())
        if light is None:
            copies = Copies(self.experts, low, ExpertCache(int(slots / size), layers), None)
        else:
            few = int(slots * low_part / size)
            high = ExpertCache(int(slots - few * size), layers)
            copies = Copies(self.experts, low, high, ExpertCache(few, layers), light)

        def reads() -> float:
            return copies.high_reads * (size if light is None else 1) + copies.low_reads * size

        with Engine(self.base, self.options(1.0)) as engine:
            engine.on_experts = copies.replace
            return self.row(name, self.decode(engine, lambda on: setattr(copies, "decoding", on)), reads)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 [tokens, vocab]."""
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))


def lines(bench: Bench, low: Bundle, mixed: Sequence[Bundle]) -> Iterator[str]:
    yield "| | mean KL | top-1 | reads a token |\n|---|---|---|---|"
    yield bench.real("exact", bench.base, bench.experts.mean_bytes)
    for option, strengths in STRENGTHS.items():
        for strength in strengths:
            yield bench.real(f"{option} {strength:g}", bench.base, bench.experts.mean_bytes, **{option: strength})
    copies = Experts(low)
    for light in LIGHT:
        for part in LOW_PARTS:
            yield bench.simulated(f"copies below {light:g}, in {part:.0%} of memory", copies, light, part)
    for bundle in mixed:
        experts = Experts(bundle)
        yield bench.real(bundle.root.name, bundle, experts.mean_bytes)
        yield bench.simulated(f"{bundle.root.name}, its experts alone", experts, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("low", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--mixed", type=Path, nargs="*", default=[])
    parser.add_argument("--memory", type=float, default=0.25, help="for experts, as a share of BASE's")
    parser.add_argument("--tokens", type=int, default=192, help="of each text after its prompt")
    args = parser.parse_args()
    bench = Bench(Bundle.open(args.reference), Bundle.open(args.base), args.texts, args.memory, args.tokens)
    for line in lines(bench, Bundle.open(args.low), [Bundle.open(path) for path in args.mixed]):
        print(line, flush=True)


if __name__ == "__main__":
    main()
