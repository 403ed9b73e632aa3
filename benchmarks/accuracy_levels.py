"""Do int8 activations change what a model says? The same weights at accuracy levels 0 and 4 of MatMulNBits.

    python benchmarks/accuracy_levels.py BUNDLE TEXTS [--schemes int4,int8,int4-all] [--max-tokens N] [--prompts N]

BUNDLE is not quantized. Each scheme is made twice, with the same bytes of weights: level 0 computes with activations
in float32, level 4 rounds them to int8 in blocks (onnxruntime issue 29849: that flips greedy tokens). Rows compare each
with BUNDLE, and level 4 with level 0: what the level alone does, beside what quantizing the weights does.
Speeds are seen in passing.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from pocketmoe.bundle.reader import Bundle
from pocketmoe.profiles.quality.divergence import Estimate
from pocketmoe.profiles.quality.quality import Slice, evaluate, read_slices
from pocketmoe.quantize.apply import quantize_bundle
from pocketmoe.quantize.schemes import find_scheme
from pocketmoe.runtime.engine.options import EngineOptions

HEAD = ["scheme", "level", "against", "mean KL", "perplexity ratio", "top-1", "same greedy tokens", "until other"]
HEAD += ["tokens/s", "decoding"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--schemes", default="int4,int8,int4-all")
    parser.add_argument("--max-tokens", type=int, default=4096, help="of each text")
    parser.add_argument("--prompts", type=int, default=64)
    args = parser.parse_args()
    slices = read_slices(args.texts)
    exact = Bundle.open(args.bundle)
    print("|".join(["", *HEAD, ""]))
    print("|".join(["", *["---"] * len(HEAD), ""]))
    for name in args.schemes.split(","):
        with tempfile.TemporaryDirectory() as directory:
            made = {level: quantize(args.bundle, Path(directory), name, level) for level in (0, 4)}
            for level, bundle in made.items():
                print(row(name, level, "float32", bundle, exact, slices, args), flush=True)
            print(row(name, 4, "level 0", made[4], made[0], slices, args), flush=True)


def quantize(source: Path, directory: Path, name: str, level: int) -> Bundle:
    scheme = replace(find_scheme(name), accuracy_level=level)
    return quantize_bundle(source, directory / f"level-{level}", scheme=scheme)


def row(
    name: str,
    level: int,
    against: str,
    bundle: Bundle,
    reference: Bundle,
    slices: list[Slice],
    args: argparse.Namespace,
) -> str:
    """One line of the table."""
    found = evaluate(
        bundle,
        slices,
        reference=reference,
        options=EngineOptions(threads=1),
        max_tokens=args.max_tokens,
        free_prompts=args.prompts,
    )
    quality, answers = found.overall.divergence, found.overall.free_running
    assert quality is not None
    assert answers is not None
    assert found.candidate_accuracy_levels == (level,)
    decoding = found.seen.candidate_decode_tokens_per_s
    cells = [
        name,
        str(level),
        against,
        estimate(quality.mean_kl_nats, ".6f"),
        estimate(quality.perplexity_ratio, ".5f"),
    ]
    cells += [f"{quality.top1_agreement.value:.2%}", estimate(answers.same_tokens, ".1%")]
    cells += [f"{answers.tokens_until_difference.value:.1f}"]
    cells += [f"{found.seen.candidate_tokens_per_s:.0f}", f"{decoding:.0f}" if decoding else "-"]
    return "|".join(["", *cells, ""])


def estimate(found: Estimate, form: str) -> str:
    if found.low is None:  # of one window
        return f"{found.value:{form}}"
    return f"{found.value:{form}} ({found.low:{form}} to {found.high:{form}})"


if __name__ == "__main__":
    main()
