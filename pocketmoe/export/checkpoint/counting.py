"""How many parameters of each class a model has, from its configuration: built on the meta device, without weights."""

from __future__ import annotations

import logging
import math
from collections import Counter
from pathlib import Path

import torch

from pocketmoe.errors import UnsupportedModel
from pocketmoe.export.capture.custom_op import find_experts
from pocketmoe.export.checkpoint import config

_MIXERS = ("attn", "attention", "mamba", "conv", "mixer", "ssm")


def count_parameters(config_json: Path) -> dict[str, int]:
    """Parameters by role (see manifest.Role), those of all routed experts as `experts`, `moe_layers` and `n_experts`.

    Raises BadInput for a setting that transformers cannot use, UnsupportedModel where it cannot build such a model or
    where none of its modules has experts that the export finds. Code from a checkpoint is never run.
    """
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)  # what transformers says of configurations is not for who plans
    try:
        settings = config.read_file(config_json)
        config.check_sizes(config_json, settings)
        model = config.make_model(config_json, settings, config.make_config(config_json, settings))
    finally:
        logging.disable(previous)
    modules = find_experts(model)
    if not modules:
        raise UnsupportedModel(f"{config_json}: no routed experts that transformers lets us take apart")
    counts = Counter({"moe_layers": len(modules), "n_experts": next(iter(modules.values())).n_experts})
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    own = {id(p): "embedding" for p in embedding.parameters()}
    own |= {id(p): "head" for p in (head.parameters() if head is not None else ()) if id(p) not in own}
    for name, parameter in model.named_parameters():
        if not any(name.startswith(f"{module}.") for module in modules):
            counts[own.get(id(parameter)) or _role(name, parameter)] += parameter.numel()
    for moe in modules.values():
        routed = moe.n_experts * sum(math.prod(shape) for shape in moe.shapes.values())
        counts["experts"] += routed
        counts["shared_expert"] += sum(parameter.numel() for parameter in moe.module.parameters()) - routed
    return dict(counts)


def _role(name: str, parameter: torch.nn.Parameter) -> str:
    if parameter.ndim < 2:
        return "norm"
    if any(mixer in name.lower() for mixer in _MIXERS):
        return "attention"
    return "router" if name.endswith(("gate.weight", "router.weight")) else "shared_expert"
