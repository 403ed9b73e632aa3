"""What does routing that prefers experts in memory cost in quality, and what does it save?

    python benchmarks/prefer_cached.py BUNDLE TEXTS [--memory 20%] [--max-tokens N] [--drop-cold]

For each strength of --prefer-cached, or share of --drop-cold: the bundle against itself with exact routing, one token
at a time (`eval`); then each text decoded as an answer, for hits, bytes and speed, also with reads slowed to 100 MB/s.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pocketmoe.bundle.reader import Bundle
from pocketmoe.profiles.quality.quality import Slice, evaluate, read_slices
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.tokenizer import Text

STRENGTHS = (0.0, 0.1, 0.25, 0.5, 1.0)
PROMPT, ANSWER = 64, 448  # tokens of each text
SLOW_BYTES_PER_S = 100e6


class Speed(NamedTuple):
    hit_rate: float
    bytes_per_token: float
    changed: float  # share of choices replaced, or of weight left out
    tokens_per_s: float  # by the median step


def decode(bundle: Bundle, texts: Sequence[np.ndarray], options: EngineOptions) -> Speed:
    """The texts' tokens one by one, after a prompt each."""
    hits = uses = nbytes = 0
    seconds: list[float] = []
    with Engine(bundle, options) as engine:
        for tokens in texts:
            engine.reset()
            engine.feed(tokens[:PROMPT].tolist())
            before = replace(engine.stats)
            for token in tokens[PROMPT : PROMPT + ANSWER].tolist():
                began = time.perf_counter()
                engine.feed([token])
                seconds.append(time.perf_counter() - began)
            found = engine.stats
            read = found.misses - before.misses
            resident = found.hits + found.prefetch_hits - before.hits - before.prefetch_hits
            hits, uses, nbytes = hits + resident, uses + resident + read, nbytes + found.bytes_read - before.bytes_read
        changed = engine.cache_routing.replaced_share or engine.skipped.share
        return Speed(hits / uses, nbytes / len(seconds), changed, 1 / statistics.median(seconds))


def rows(bundle: Bundle, slices: Sequence[Slice], options: EngineOptions, option: str, most: int) -> Iterator[str]:
    tokenizer = Text(bundle)
    texts = [np.array(tokenizer.encode(piece.text)) for piece in slices]
    yield f"| {option} | changed | hits | bytes a token | tokens/s | at 100 MB/s | perplexity | mean KL | top-1 |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for strength in STRENGTHS:
        given = replace(options, **{option: strength})
        found = evaluate(bundle, slices, reference=bundle, options=given, max_tokens=most).overall.divergence
        assert found is not None
        speed = decode(bundle, texts, replace(given, capacity=PROMPT + ANSWER))
        slow = decode(bundle, texts, replace(given, capacity=PROMPT + ANSWER, read_bytes_per_s=SLOW_BYTES_PER_S))
        yield (
            f"| {strength:g} | {speed.changed:.1%} | {speed.hit_rate:.1%} | {speed.bytes_per_token / 1e3:.0f} kB "
            f"| {speed.tokens_per_s:.0f} | {slow.tokens_per_s:.0f} | {found.perplexity_ratio.value - 1:+.2%} "
            f"| {found.mean_kl_nats.value:.4f} | {found.top1_agreement.value:.1%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--memory", default="20%")
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--drop-cold", action="store_true", help="shares of --drop-cold instead")
    arguments = parser.parse_args()
    options = EngineOptions(memory=MemoryRequest.parse(arguments.memory))
    option = "drop_cold" if arguments.drop_cold else "prefer_cached"
    for row in rows(Bundle.open(arguments.bundle), read_slices(arguments.texts), options, option, arguments.max_tokens):
        print(row, flush=True)


if __name__ == "__main__":
    main()
