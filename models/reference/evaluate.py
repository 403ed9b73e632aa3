"""Measure the reference model: perplexity per kind, unigram baselines, routing per kind, load balance.

Usage: ``python evaluate.py``. Reads only files of the repository: the checkpoint,
heldout/*.txt and unigram.npy (token counts of the training text; rewritten when work/tokens is there).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import KINDS
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
LENGTH = 256
PROMPTS = {
    "prose": "She was not at all surprised to",
    "docs": "The following command creates an index on",
    "python": "class Node:\n    def __init__(self,",
    "french": "Cette directive permet de",
    "ood": "(define (square x)",
}


class RoutingRecord:
    """Counts the choices of every router by forward hooks."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.counts = torch.zeros(config.num_hidden_layers, config.num_experts, dtype=torch.long)
        for number, layer in enumerate(model.model.layers):
            layer.mlp.gate.register_forward_hook(self._counter(number))

    def _counter(self, number: int) -> Any:
        def count(_module: torch.nn.Module, _inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
            self.counts[number] += torch.bincount(output[2].reshape(-1), minlength=self.counts.shape[1])

        return count

    def take(self) -> np.ndarray:
        """Counts (layers, experts) since the last call."""
        counts = self.counts.numpy().copy()
        self.counts.zero_()
        return counts


def unigram_counts(work: Path) -> np.ndarray:
    """Token counts of the training text: (kinds, vocabulary), in the order of KINDS."""
    stored = HERE / "unigram.npy"
    folder = work / "tokens"
    if folder.exists():
        size = len(AutoTokenizer.from_pretrained(HERE / "checkpoint"))
        arrays = [np.load(folder / f"{kind}.npy", allow_pickle=False) for kind in KINDS]
        np.save(stored, np.stack([np.bincount(a, minlength=size) for a in arrays]).astype(np.int32))
    return np.load(stored, allow_pickle=False)


def unigram_perplexity(ids: np.ndarray, counts: np.ndarray) -> float:
    """Perplexity of token ids (N,) under add-one smoothed weights (vocabulary,)."""
    probabilities = (counts + 1.0) / (counts + 1.0).sum()
    return float(np.exp(-np.log(probabilities[ids]).mean()))


@torch.no_grad()
def losses(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Loss in nats of every token but the first of each window of LENGTH: a flat tensor."""
    windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    found = []
    for rows in windows.split(8):
        logits = model(rows, use_cache=False).logits.float()
        found.append(functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="none"))
    return torch.cat(found)


def language(found: torch.Tensor, text: str, ids: torch.Tensor, counts: np.ndarray, kind: str) -> dict[str, float]:
    """Perplexities of one held-out text from its losses (tokens,) in nats."""
    nats = float(found.mean())
    mixture = (counts / counts.sum(1, keepdims=True)).mean(0) * counts.sum()
    result = {
        "tokens": len(found),
        "perplexity": math.exp(nats),
        "standard_error_of_loss": float(found.std() / math.sqrt(len(found))),
        "bits_per_byte": nats / math.log(2) * len(ids) / len(text.encode()),
        "unigram_perplexity": unigram_perplexity(ids.numpy(), mixture),
    }
    if kind in KINDS:
        own = counts[KINDS.index(kind)]
        result["unigram_of_kind_perplexity"] = unigram_perplexity(ids.numpy(), own)
    return {name: round(value, 4) for name, value in result.items()}


def divergence(left: np.ndarray, right: np.ndarray) -> float:
    """Jensen-Shannon divergence in bits between histograms (layers, experts), averaged over the layers."""
    left, right = left / left.sum(1, keepdims=True), right / right.sum(1, keepdims=True)
    middle = (left + right) / 2

    def relative(part: np.ndarray) -> np.ndarray:
        ratio = np.divide(part, middle, out=np.ones_like(part), where=part > 0)
        return (part * np.log2(ratio)).sum(1)

    return float((relative(left) + relative(right)).mean() / 2)


def balance(share: np.ndarray) -> dict[str, Any]:
    """Load statistics of shares (layers, experts): relative to a uniform load, and normalised entropy."""
    experts = share.shape[1]
    entropy = -(share * np.log(np.maximum(share, 1e-12))).sum(1) / math.log(experts)
    return {
        "max_load": [round(float(v), 3) for v in share.max(1) * experts],
        "min_load": [round(float(v), 3) for v in share.min(1) * experts],
        "entropy": [round(float(v), 4) for v in entropy],
        "below_a_tenth_of_uniform": int((share * experts < 0.1).sum()),
    }


def specialists(shares: dict[str, np.ndarray]) -> dict[str, int]:
    """How many experts get at least half of their load from one kind (a quarter would be no preference)."""
    stack = np.stack([shares[kind] for kind in KINDS])
    owned = stack / np.maximum(stack.sum(0, keepdims=True), 1e-12)
    return {kind: int((owned[i] >= 0.5).sum()) for i, kind in enumerate(KINDS)}


def routing(counts: dict[str, np.ndarray], halves: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """The routing part of the report from counts (layers, experts) per kind and halves of each kind."""
    shares = {kind: c / c.sum(1, keepdims=True) for kind, c in counts.items()}
    mixed = np.mean([shares[kind] for kind in KINDS], axis=0)
    pairs = itertools.combinations(sorted(shares), 2)
    return {
        "balance_of_the_mixture": balance(mixed),
        "balance_per_kind": {kind: balance(share) for kind, share in sorted(shares.items())},
        "js_divergence_bits": {f"{a}/{b}": round(divergence(shares[a], shares[b]), 4) for a, b in pairs},
        "js_divergence_of_halves_bits": {k: round(divergence(*pair), 4) for k, pair in sorted(halves.items())},
        "experts_with_half_their_load_from": specialists(shares),
        "experts_in_total": int(mixed.size),
        "histogram": {kind: np.round(share, 4).tolist() for kind, share in sorted(shares.items())},
    }


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompt: str) -> str:
    """A greedy continuation."""
    encoded = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**encoded, max_new_tokens=60, do_sample=False)
    return str(tokenizer.decode(output[0]))


def evaluate(folder: Path, work: Path) -> dict[str, Any]:
    """The whole report for one checkpoint folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    record = RoutingRecord(model)
    unigrams = unigram_counts(work)
    report: dict[str, Any] = {"language": {}}
    counts, halves = {}, {}
    for path in sorted((HERE / "heldout").glob("*.txt")):
        text = path.read_text()
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        middle = len(ids) // 2 // LENGTH * LENGTH
        found, pair = [], []
        for half in (ids[:middle], ids[middle:]):
            found.append(losses(model, half))
            pair.append(record.take())
        report["language"][path.stem] = language(torch.cat(found), text, ids, unigrams, path.stem)
        halves[path.stem] = (pair[0], pair[1])
        counts[path.stem] = pair[0] + pair[1]
    report["routing"] = routing(counts, halves)
    report["greedy_samples"] = {kind: sample(model, tokenizer, prompt) for kind, prompt in PROMPTS.items()}
    return report


def to_json(report: dict[str, Any]) -> str:
    """Indented JSON with the rows of numbers on one line each."""
    histogram = report["routing"].pop("histogram")
    text = json.dumps(report, indent=1, ensure_ascii=False)
    rows = {
        kind: "[\n   " + ",\n   ".join(json.dumps(row) for row in table) + "\n  ]" for kind, table in histogram.items()
    }
    report["routing"]["histogram"] = histogram
    body = ",\n".join(f'  "{kind}": {row}' for kind, row in rows.items())
    return text[: text.rindex("\n}")] + ',\n "histogram": {\n' + body + "\n }\n}\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--out", type=Path, default=HERE / "evaluation.json")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = evaluate(options.checkpoint, options.work)
    options.out.write_text(to_json(report))
    for kind, figures in report["language"].items():
        sys.stderr.write(f"{kind:7} {figures['perplexity']:8.2f} unigram {figures['unigram_perplexity']:8.2f}\n")


if __name__ == "__main__":
    main()
