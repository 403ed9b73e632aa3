"""Which of eval's gates see a model whose decoding is broken, though it is fine on given text?

    python benchmarks/broken_decoding.py BUNDLE REFERENCE TEXTS [--max-tokens N] [--prompts N]

Logits of single steps of the candidate are changed in ways that stand for broken kernels (llama.cpp issue 4927 wrote
garbage with a good perplexity): Gaussian noise of some strength, ids off by one, one token far too likely.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pocketmoe.bundle.reader import Bundle
from pocketmoe.profiles.quality.divergence import Estimate
from pocketmoe.profiles.quality.gate import judge
from pocketmoe.profiles.quality.quality import evaluate, read_slices
from pocketmoe.runtime.engine.engine import Engine, Rows

Damage = Callable[[np.ndarray, int], np.ndarray]  # logits, float32 [1, vocab], and the text's length


def noise(strength: float) -> Damage:
    def damage(logits: np.ndarray, length: int) -> np.ndarray:
        drawn = np.random.default_rng(length).normal(0, strength, logits.shape)
        return logits + drawn.astype(np.float32)

    return damage


def stuck(logits: np.ndarray, _length: int) -> np.ndarray:
    return logits + 30 * (np.arange(logits.shape[1]) == 263).astype(np.float32)


DAMAGES: dict[str, Damage] = {
    "none": lambda logits, _: logits,
    **{f"noise {strength}": noise(strength) for strength in (0.5, 1.0, 2.0)},
    "off by one": lambda logits, _: np.roll(logits, 1, axis=1),
    "stuck": stuck,
}


def break_decoding(broken: Bundle, damage: Damage) -> None:
    """Let every engine of that bundle go wrong where it is fed one token."""

    def feed(self: Engine, tokens: Sequence[int], rows: Rows = "last") -> np.ndarray:
        logits = whole(self, tokens, rows)
        single = self.bundle is broken and len(tokens) == 1 and rows == "last"
        return damage(logits, self.length) if single else logits

    Engine.feed = feed


whole = Engine.feed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--max-tokens", type=int, default=600, help="of each text")
    parser.add_argument("--prompts", type=int, default=16)
    args = parser.parse_args()
    candidate, reference = Bundle.open(args.bundle), Bundle.open(args.reference)
    print("| damage | perplexity ratio | same tokens | own KL | excess nll | excess repetition | gates failed |")
    print("|---|---|---|---|---|---|---|")
    for name, damage in DAMAGES.items():
        break_decoding(candidate, damage)
        report = evaluate(
            candidate,
            read_slices(args.texts),
            reference=reference,
            max_tokens=args.max_tokens,
            free_prompts=args.prompts,
        )
        compared, answers = report.overall.divergence, report.overall.free_running
        assert compared is not None
        assert answers is not None
        failed = ", ".join(verdict.metric for verdict in judge(report) if not verdict.passed) or "-"
        cells = [name, f"{compared.perplexity_ratio.value:.4f}", f"{answers.same_tokens.value:.0%}"]
        cells += [estimate(answers.mean_kl_nats), estimate(answers.excess_nll_nats)]
        cells += [estimate(answers.excess_repetition), failed]
        print(f"| {' | '.join(cells)} |", flush=True)


def estimate(found: Estimate) -> str:
    if found.low is None:  # of one window
        return f"{found.value:.3f}"
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


if __name__ == "__main__":
    main()
