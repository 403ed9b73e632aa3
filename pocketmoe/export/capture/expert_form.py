"""What a class of MoE modules has for experts and what one of them computes; `register` for classes of your own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

RunExperts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Tensors = Mapping[str, torch.Tensor]
Compute = Callable[[Any, Tensors, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ExpertsForm:
    """How the modules of one class hold and compute their routed experts.

    `weights` names each tensor of one expert, and says which parameter of the module it comes from:
    "experts.{}.up.weight" (one parameter per expert, numbered from 0) or "up" (all of them stacked along axis 0).
    `compute(module, tensors, x)` is one expert: its tensors by name, x float [rows, width] -> float [rows, width].
    `forward(module, experts, hidden_states, ...)` is the module's forward with a call of
    `experts(x [tokens, width], ids int64 [tokens, k], weights [tokens, k]) -> [tokens, width]` for the weighted sum of
    the chosen experts; None when the module's forward has just these arguments and dispatches by itself.
    `shared` has tensors that all experts of the module use alike, such as a norm after each.
    """

    weights: Mapping[str, str]
    compute: Compute
    forward: Callable[..., Any] | None = None
    shared: Mapping[str, str] = field(default_factory=dict[str, str])


REGISTERED: dict[str, ExpertsForm] = {}  # by a class's full name


def register(module_class: type[torch.nn.Module], form: ExpertsForm) -> None:
    """Tell the export where the modules of a class have their experts; for the whole process."""
    if form.forward is None:
        raise TypeError("a registered form needs a forward that calls its experts")
    REGISTERED[full_name(module_class)] = form


def full_name(module_class: type) -> str:
    """What a class is registered under."""
    return f"{module_class.__module__}.{module_class.__qualname__}"
