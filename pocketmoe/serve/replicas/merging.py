"""Metrics and states of all replicas as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

_SUMS = ("budget_bytes", "used_bytes", "peak_bytes", "running", "waiting")


def merged_metrics(pages: Sequence[str]) -> str:
    """Prometheus' text of all replicas' texts: each sample is labelled with its replica, from 0 on."""
    families: dict[str, Metric] = {}
    for index, page in enumerate(pages):
        for family in text_string_to_metric_families(page):
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                whole.add_sample(sample.name, {**sample.labels, "replica": str(index)}, sample.value)
    return "".join(_family_text(family) for family in families.values())


def _family_text(family: Metric) -> str:
    name = f"{family.name}_total" if family.type == "counter" else family.name
    about = family.documentation.replace("\\", r"\\").replace("\n", r"\n")
    lines = [f"# HELP {name} {about}", f"# TYPE {name} {family.type}"]
    for sample in family.samples:
        labels = ",".join(f'{label}="{_escaped(value)}"' for label, value in sorted(sample.labels.items()))
        lines.append(f"{sample.name}{{{labels}}} {sample.value!r}")
    return "\n".join(lines) + "\n"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def merged_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the page shows: bytes, requests and counts in sum, experts that are in memory anywhere."""
    whole: dict[str, Any] = {name: sum(state[name] for state in states) for name in _SUMS}
    claims: dict[str, int] = {}
    for state in states:
        for what, nbytes in state["claims"].items():
            claims[what] = claims.get(what, 0) + nbytes
    names = [model["id"] for model in states[0]["models"]]
    every = [[next(m for m in state["models"] if m["id"] == name) for state in states] for name in names]
    return {**whole, "claims": claims, "models": [_merged_model(models) for models in every]}


def _merged_model(models: Sequence[dict[str, Any]]) -> dict[str, Any]:
    loaded = [model for model in models if model["loaded"]]
    if not loaded:
        return models[0]
    counts = {name: sum(model["counts"][name] for model in loaded) for name in loaded[0]["counts"]}
    layers = range(len(loaded[0]["uses"]))
    return {
        **loaded[0],
        "counts": counts,
        "uses": [
            [sum(uses) for uses in zip(*(model["uses"][layer] for model in loaded), strict=True)] for layer in layers
        ],
        "resident": [_any([model["resident"][layer] for model in loaded]) for layer in layers],
    }


def _any(texts: Sequence[str]) -> str:
    return "".join("1" if "1" in signs else "0" for signs in zip(*texts, strict=True))
