"""Write the model card, checkpoint/README.md, from the recorded figures.

Usage: ``python card.py``, after train.py and evaluate.py. Every number in the card is read from training.json,
evaluation.json, corpus.toml and corpus.lock.json, so that the card cannot disagree with them.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
HEADER = """---
license: apache-2.0
language:
- en
- fr
tags:
- olmoe
- mixture-of-experts
- test-fixture
- cpu
pipeline_tag: text-generation
library_name: transformers
---

# PocketMoE reference model

A very small mixture-of-experts language model, trained from nothing, for testing export, quantisation and expert
paging on *learned* weights. It is an ordinary `OlmoeForCausalLM`: {layers} layers of {experts} experts of which
{active} are active, hidden size {hidden}, {heads} attention heads ({kv} key/value heads), a vocabulary of
{vocab}, and a context of {context} tokens, though it was trained on windows of {length}. {parameters:.1f} million
parameters, about {per_token:.1f} million of them used per token; {size:.1f} MB in bfloat16.

It is a test fixture. Do not use it to answer questions or to write text for people.
"""
LIMITS = """## Intended use and limits

- Meant for: numerical comparison of an exported or quantised model with its original, tests of routing, caching and
  prefetching on realistic expert choices, perplexity differences, and drift between kinds of text.
- Not meant for: any use of the text it generates. It knows next to nothing, and states falsehoods fluently.
- It has seen {tokens:.1f} million tokens, fewer than a language model of its size should; its perplexities say
  how a quantisation changes *it*, not how the same quantisation changes a large model.
- The French is technical documentation, and so close in subject to the English documentation; some of its pages
  contain untranslated English. The held-out prose is partly drama in verse.
- The held-out texts are whole documents that were kept out of training, but from the same packages as training
  documents: licence headers, page furniture and recurring phrases do occur in both.
- Scheme, the kind outside the distribution, appears in no source of the recipe as a kind of its own; single
  fragments inside the training text were not searched for.
- A load balancing loss is taken per layer over batches that mix the four kinds in equal parts, so the balance
  holds for such a mixture and not for one kind alone.
- Positions beyond {length} were never trained.
"""


def load(name: str) -> dict[str, Any]:
    """A JSON file of this folder."""
    found: dict[str, Any] = json.loads((HERE / name).read_text())
    return found


def header() -> str:
    """Front matter and description, with the figures of config.json."""
    config, recipe = load("checkpoint/config.json"), load("training.json")["recipe"]
    hidden, vocab, layers = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    kv_share = config["num_key_value_heads"] / config["num_attention_heads"]
    attention = int(hidden * hidden * (2 + 2 * kv_share)) + hidden * config["num_experts"]
    expert = 3 * hidden * config["intermediate_size"]
    fixed = 2 * vocab * hidden + layers * attention
    weights = (HERE / "checkpoint" / "model.safetensors").stat().st_size
    return HEADER.format(
        layers=layers,
        experts=config["num_experts"],
        active=config["num_experts_per_tok"],
        hidden=hidden,
        heads=config["num_attention_heads"],
        kv=config["num_key_value_heads"],
        vocab=vocab,
        context=config["max_position_embeddings"],
        length=recipe["length"],
        parameters=(fixed + layers * config["num_experts"] * expert) / 1e6,
        per_token=(fixed - vocab * hidden + layers * config["num_experts_per_tok"] * expert) / 1e6,
        size=weights / 1e6,
    )


def provenance() -> str:
    """The table of packages."""
    lock, sources = load("corpus.lock.json"), tomllib.loads((HERE / "corpus.toml").read_text())["source"]
    lines = ["## Training data", "", "| Kind | Package | Registry | Licence |", "|---|---|---|---|"]
    for source in sources:
        kind = "never trained on" if source["kind"] == "ood" else source["kind"]
        lines.append(f"| {kind} | {source['package']} | {source['registry']} | {source['licence']} |")
    sizes = [f"{kind} {size['characters'] / 1e6:.1f}" for kind, size in lock["training"].items()]
    lines += [
        "",
        f"Millions of characters available for training: {', '.join(sizes)}. File names and SHA-256 of the",
    ]
    lines += [
        "packages are in `corpus.lock.json`; the packages themselves are not redistributed here. Some are under"
    ]
    lines += [
        "copyleft licences (GPL, GFDL, MPL); the weights contain no copy of them that we know of, but no test"
    ]
    lines += [
        "for memorised passages was made. The texts that do ship (held-out and calibration) come from public"
    ]
    lines += ["domain and permissively licensed sources only, credited in `heldout/NOTICE.md`.", ""]
    return "\n".join(lines)


def training() -> str:
    """Cost and recipe."""
    notes = load("training.json")
    recipe = ", ".join(f"{key} {value}" for key, value in notes["recipe"].items())
    epochs = ", ".join(f"{kind} {value:.2f}" for kind, value in notes["epochs"].items())
    hours = notes["seconds"] / 3600
    return f"""## Training

{notes["tokens"] / 1e6:.2f} million tokens in {notes["recipe"]["steps"]} steps, {hours:.2f} hours of wall-clock time on
two shared CPU cores, at most {2 * hours:.1f} core hours; other work ran on the same cores. The energy was not measured.
Passes over the text: {epochs}. Muon for the matrices inside the layers, AdamW for the embeddings, the routers and
the norms; bfloat16 autocast outside the experts, float32 inside; losses for balance (per layer) and for large
router logits. Recipe: {recipe}. The order of data is fixed by the seed; the arithmetic is not guaranteed to be
bit-identical across machines or thread counts.
"""


def perplexities(language: dict[str, dict[str, float]]) -> str:
    """The perplexity table."""
    lines = [
        "## Held-out perplexity",
        "",
        "Per token, windows of 256 without context before the window, bfloat16",
    ]
    lines += [
        "weights evaluated in float32. *Unigram*: token frequencies of the training mixture; *of its kind*:"
    ]
    lines += ["frequencies of that kind only.", ""]
    lines += [
        "| Text | Tokens | Perplexity | Bits per byte | Unigram | Unigram of its kind |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for kind, row in sorted(language.items(), key=lambda item: (item[0] == "ood", item[0])):
        own = row.get("unigram_of_kind_perplexity")
        name = "ood (Scheme)" if kind == "ood" else kind
        cells = [name, f"{row['tokens']:.0f}", f"{row['perplexity']:.1f}", f"{row['bits_per_byte']:.2f}"]
        cells += [f"{row['unigram_perplexity']:.0f}", f"{own:.0f}" if own else "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def routing(figures: dict[str, Any], histogram: dict[str, list[list[float]]]) -> str:
    """Balance, specialisation, and the busiest experts of each kind."""
    even = figures["balance_of_the_mixture"]
    kinds = figures["experts_with_half_their_load_from"]
    owned = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
    lines = [
        "## Routing",
        "",
        "Load of the equal mixture of the four kinds, relative to a uniform load, per layer:",
        "",
    ]
    lines += ["| Layer | Busiest expert | Idlest expert | Entropy / maximum |", "|---|--:|--:|--:|"]
    rows = zip(even["max_load"], even["min_load"], even["entropy"], strict=True)
    lines += [
        f"| {n} | {top:.2f} | {low:.2f} | {entropy:.3f} |" for n, (top, low, entropy) in enumerate(rows)
    ]
    lines += [
        "",
        f"Experts (of {figures['experts_in_total']}) that get at least half of their load from one kind, where a",
    ]
    lines += [f"quarter would be no preference: {owned}.", ""]
    lines += [
        "Jensen-Shannon divergence of the routing histograms, in bits, averaged over the layers; on the diagonal,"
    ]
    lines += ["between the two halves of one text, which is what chance and topic give:", ""]
    names = sorted(histogram)
    lines += ["| | " + " | ".join(names) + " |", "|---|" + "--:|" * len(names)]
    pairs, halves = figures["js_divergence_bits"], figures["js_divergence_of_halves_bits"]
    for a in names:
        cells = [f"*{halves[a]:.3f}*" if a == b else f"{pairs['/'.join(sorted((a, b)))]:.3f}" for b in names]
        lines.append(f"| {a} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "The four busiest experts of each kind, with their share of that kind's load (uniform: 0.031):",
        "",
    ]
    lines += ["| Layer | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for layer in range(len(histogram[names[0]])):
        cells = []
        for name in names:
            share = np.array(histogram[name][layer])
            cells.append(", ".join(f"{e} ({share[e]:.2f})" for e in np.argsort(-share)[:4]))
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "The whole histogram is in `evaluation.json`.", ""])


def samples(texts: dict[str, str]) -> str:
    """The greedy continuations."""
    parts = ["## Greedy continuations", ""]
    for kind, text in texts.items():
        parts += [f"{kind}:", "", "```text", text.rstrip(), "```", ""]
    return "\n".join(parts)


def main() -> None:
    """Write the card."""
    report, notes = load("evaluation.json"), load("training.json")
    parts = [header(), provenance(), training(), perplexities(report["language"])]
    parts += [routing(report["routing"], report["histogram"]), samples(report["greedy_samples"])]
    parts.append(LIMITS.format(tokens=notes["tokens"] / 1e6, length=notes["recipe"]["length"]))
    (HERE / "checkpoint" / "README.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
