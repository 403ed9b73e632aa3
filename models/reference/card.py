"""Write the model card, checkpoint/README.md, from card_template.md and the recorded figures.

Usage: ``python card.py``, after train.py and evaluate.py. Every number comes from training.json,
evaluation.json, corpus.toml, corpus.lock.json and config.json, so the card cannot disagree with them.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent


def load(name: str) -> dict[str, Any]:
    """A JSON file of this folder."""
    found: dict[str, Any] = json.loads((HERE / name).read_text())
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def architecture() -> dict[str, Any]:
    """Sizes from config.json; parameters in millions, without the norms."""
    config = load("checkpoint/config.json")
    hidden, vocab, layers = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    kv_share = config["num_key_value_heads"] / config["num_attention_heads"]
    expert = 3 * hidden * config["intermediate_size"]
    outside = int(hidden * hidden * (2 + 2 * kv_share)) + hidden * config["num_experts"]
    total = 2 * vocab * hidden + layers * (outside + config["num_experts"] * expert)
    used = vocab * hidden + layers * (outside + config["num_experts_per_tok"] * expert)
    return {
        "layers": layers,
        "experts": config["num_experts"],
        "active": config["num_experts_per_tok"],
        "hidden": hidden,
        "heads": config["num_attention_heads"],
        "kv": config["num_key_value_heads"],
        "vocab": vocab,
        "context": config["max_position_embeddings"],
        "parameters": total / 1e6,
        "per_token": used / 1e6,
        "size": (HERE / "checkpoint" / "model.safetensors").stat().st_size / 1e6,
        "all_experts": layers * config["num_experts"],
        "uniform": 1 / config["num_experts"],
    }


def provenance() -> dict[str, Any]:
    """The table of packages and the size of the training text."""
    rows = []
    for source in tomllib.loads((HERE / "corpus.toml").read_text())["source"]:
        kind = "never trained on" if source["kind"] == "ood" else source["kind"]
        rows.append([kind, source["package"], source["registry"], source["licence"]])
    sizes = load("corpus.lock.json")["training"].items()
    return {
        "sources": table(["Kind", "Package", "Registry", "Licence"], rows),
        "characters": ", ".join(f"{kind} {size['characters'] / 1e6:.1f}" for kind, size in sizes),
    }


def training() -> dict[str, Any]:
    """Cost and recipe."""
    notes = load("training.json")
    return {
        "tokens": notes["tokens"] / 1e6,
        "steps": notes["recipe"]["steps"],
        "length": notes["recipe"]["length"],
        "hours": notes["seconds"] / 3600,
        "core_hours": 2 * notes["seconds"] / 3600,
        "epochs": ", ".join(f"{kind} {value:.2f}" for kind, value in notes["epochs"].items()),
        "recipe": ", ".join(f"{key} {value}" for key, value in notes["recipe"].items()),
    }


def perplexities(language: dict[str, dict[str, float]]) -> str:
    """The perplexity table, the kind never trained on last."""
    rows = []
    for kind, row in sorted(language.items(), key=lambda item: (item[0] == "ood", item[0])):
        own = row.get("unigram_of_kind_perplexity")
        cells = ["ood (Scheme)" if kind == "ood" else kind, f"{row['tokens']:.0f}"]
        cells += [f"{row['perplexity']:.1f}", f"{row['bits_per_byte']:.2f}"]
        rows.append([*cells, f"{row['unigram_perplexity']:.0f}", f"{own:.0f}" if own else "-"])
    return table(["Text", "Tokens", "Perplexity", "Bits per byte", "Unigram", "Of its kind"], rows)


def balance(figures: dict[str, list[float]]) -> str:
    """The load table, one row per layer."""
    columns = zip(figures["max_load"], figures["min_load"], figures["entropy"], strict=True)
    rows = [[str(n), f"{a:.2f}", f"{b:.2f}", f"{c:.3f}"] for n, (a, b, c) in enumerate(columns)]
    return table(["Layer", "Busiest expert", "Idlest expert", "Entropy / maximum"], rows)


def divergences(figures: dict[str, Any], names: list[str]) -> str:
    """Pairwise divergences of the kinds."""
    pairs, halves = figures["js_divergence_bits"], figures["js_divergence_of_halves_bits"]
    rows = []
    for a in names:
        found = [halves[a] if a == b else pairs["/".join(sorted((a, b)))] for b in names]
        rows.append([a, *(f"*{v:.3f}*" if a == b else f"{v:.3f}" for b, v in zip(names, found, strict=True))])
    return table(["", *names], rows)


def busiest(histogram: dict[str, list[list[float]]], names: list[str]) -> str:
    """The four busiest experts per layer and kind."""
    rows = []
    for layer in range(len(histogram[names[0]])):
        shares = [np.array(histogram[name][layer]) for name in names]
        cells = [", ".join(f"{e} ({share[e]:.2f})" for e in np.argsort(-share)[:4]) for share in shares]
        rows.append([str(layer), *cells])
    return table(["Layer", *names], rows)


def main() -> None:
    """Write the card."""
    report = load("evaluation.json")
    names, figures = sorted(report["histogram"]), report["routing"]
    owned = figures["experts_with_half_their_load_from"].items()
    texts = report["greedy_samples"].items()
    card = (
        (HERE / "card_template.md")
        .read_text()
        .format(
            **architecture(),
            **provenance(),
            **training(),
            perplexities=perplexities(report["language"]),
            balance=balance(figures["balance_of_the_mixture"]),
            specialists=", ".join(f"{kind} {count}" for kind, count in owned),
            divergences=divergences(figures, names),
            busiest=busiest(report["histogram"], names),
            samples="\n\n".join(f"{kind}:\n\n```text\n{text.rstrip()}\n```" for kind, text in texts),
        )
    )
    (HERE / "checkpoint" / "README.md").write_text(card)


if __name__ == "__main__":
    main()
