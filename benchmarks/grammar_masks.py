"""What a mask costs with a vocabulary of 150,000 tokens, beside a decode step.

    python benchmarks/grammar_masks.py [--tokens 150000] [--step-ms 160]

The vocabulary is made: byte-level BPE's bytes, and words of syllables with what text and JSON have around them. For a
schema, an expression and a grammar: time to compile, mean and longest time of a mask and what a step does for it
(processor time of its thread, so that a busy machine counts only in the step), and the mean as a share of a step of
OLMoE-1B-7B's shape, 160 ms, or of what --step-ms says.
"""

from __future__ import annotations

import argparse
import random
import time

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pocketmoe.grammar.constraint import constraint
from pocketmoe.grammar.guide import Guides, guide_bytes
from pocketmoe.runtime.memory.budget import trim
from pocketmoe.system.memory import process_bytes

END = "<|end|>"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "age": {"type": "integer"},
    },
    "required": ["name", "tags", "age"],
    "additionalProperties": False,
}
FORMS = {
    "schema": {"json_schema": PERSON},
    "expression": {"regex": r"[A-Za-z ,]{20,400}\."},
    "grammar": {"grammar": 'start: "[" NUMBER ("," NUMBER)* "]"\nNUMBER: /-?[0-9]{1,9}/'},
}


def made_tokenizer(size: int) -> Tokenizer:
    """A tokenizer of that many tokens; its words are tokens that no merge makes, which masks do not mind."""
    rng, letters = random.Random(0), ("bcdfghjklmnprstvwz", "aeiou")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = dict.fromkeys(alphabet)
    while len(words) < size - 1:
        word = "".join(rng.choice(letters[0]) + rng.choice(letters[1]) for _ in range(rng.randint(1, 4)))
        words[rng.choice(["", "Ġ", "", "Ġ", '"', "ĊĠĠ"]) + word + rng.choice(["", "", '"', '":', ",", "s", "."])] = None
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return tokenizer


def masks(guides: Guides, asked: dict[str, object], steps: int) -> tuple[float, list[float]]:
    """Seconds to compile, and of each step's accepting a token and making the next mask."""
    rng, times = np.random.default_rng(0), list[float]()
    held = constraint(**asked)  # type: ignore[arg-type]
    assert held is not None
    began = time.thread_time()
    guide = guides.guide(held)
    compiled = time.thread_time() - began
    while len(times) < steps:
        if guide.complete:
            guide = guides.guide(held)
        token = int(rng.choice(np.flatnonzero(guide.allowed)))
        began = time.thread_time()
        guide.accept(token)
        guide.forced(64)
        times.append(time.thread_time() - began)
    return compiled, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=150_000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--step-ms", type=float, default=160.0)
    given = parser.parse_args()
    step = given.step_ms / 1e3
    tokenizer = made_tokenizer(given.tokens)
    trim()
    before = process_bytes()
    guides = Guides(tokenizer, tokenizer.get_vocab_size(), [tokenizer.get_vocab_size() - 1])
    print(f"{tokenizer.get_vocab_size()} tokens; a step: {given.step_ms:.0f} ms")
    print(f"{'form':<12}{'compile ms':>12}{'mask ms':>10}{'longest':>10}{'of a step':>11}")
    for name, asked in FORMS.items():
        compiled, times = masks(guides, asked, given.steps)
        mean = float(np.mean(times))
        print(f"{name:<12}{1e3 * compiled:>12.1f}{1e3 * mean:>10.2f}{1e3 * max(times):>10.2f}{mean / step:>10.1%}")
    trim()
    promised = guide_bytes(tokenizer.get_vocab_size())
    print(f"memory: {(process_bytes() - before) / 1e6:.0f} MB taken, {promised / 1e6:.0f} MB promised")


if __name__ == "__main__":
    main()
