"""What transformers' `generate` costs beside the package's own, on one bundle: decoding, by turns in one process.

    python benchmarks/optimum_generate.py demo/olmoe-int4 [--tokens 128] [--rounds 9]

Both decode the same prompt greedily, and must give the same tokens. The ratio is of seconds a token, the median of
rounds; what is common to both, the prompt, is taken out by answers of one token.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import pocketmoe
from pocketmoe.integrations.optimum import PocketMoEForCausalLM

PROMPT = "To create an index, use the"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    with (
        pocketmoe.load(asked.bundle, structured=False) as own,
        PocketMoEForCausalLM.from_pretrained(asked.bundle) as theirs,
    ):
        ids = own.tokenize(PROMPT)
        tensor = torch.tensor([ids])

        def by_own(tokens: int) -> list[int]:
            return list(own.generate(ids, max_tokens=tokens, min_tokens=tokens).tokens)

        def by_optimum(tokens: int) -> list[int]:
            options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
            return theirs.generate(tensor, **options)[0, len(ids) :].tolist()

        assert by_own(asked.tokens) == by_optimum(asked.tokens), "the tokens differ"
        ratios: list[float] = []
        for number in range(asked.rounds):
            order = (by_own, by_optimum) if number % 2 else (by_optimum, by_own)
            seconds = {each.__name__: seconds_a_token(each, asked.tokens) for each in order}
            ratios.append(seconds["by_optimum"] / seconds["by_own"])
            print(f"{1e3 * seconds['by_own']:.2f} ms, {1e3 * seconds['by_optimum']:.2f} ms: {ratios[-1]:.3f}")
        print(f"median {statistics.median(ratios):.3f}")


def seconds_a_token(generate: Callable[[int], list[int]], tokens: int) -> float:
    """Of decoding, without the prompt."""
    ends: list[float] = []
    for count in (1, tokens):
        began = time.perf_counter()
        generate(count)
        ends.append(time.perf_counter() - began)
    return (ends[1] - ends[0]) / (tokens - 1)


if __name__ == "__main__":
    main()
