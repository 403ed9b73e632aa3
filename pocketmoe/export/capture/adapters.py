"""Where a module keeps its routed experts, and what one of them computes: all that the export has to know of them.

Modules that transformers computes through its experts interface are known by what its decorator leaves on them. Any
other class takes part by `expert_form.register` (docs/OWN_MODEL.md has a whole example).
"""

# pyright: reportPrivateUsage=false
# (torch has no public way to a module's own children and parameters, those that are None included)

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pocketmoe.errors import UnsupportedModel
from pocketmoe.export.capture.expert_form import REGISTERED, ExpertsForm, Tensors, full_name
from pocketmoe.export.capture.registered import FORMS

_FLAGS = ("is_concatenated", "is_transposed", "has_bias", "has_gate")  # what transformers' decorator leaves behind
_NUMBER = "{}"


def form_of(module: torch.nn.Module) -> ExpertsForm | None:
    """The form of a module's experts; None when it has none that are known of."""
    name = full_name(type(module))
    form = REGISTERED.get(name) or FORMS.get(name)
    if form is not None:
        return form
    decorated = all(hasattr(module, flag) for flag in _FLAGS) and hasattr(type(module).forward, "__wrapped__")
    return _interface_form(module) if decorated else None


def _interface_form(module: Any) -> ExpertsForm:
    """The form of a module behind transformers' experts interface; `MoeModule.of` refuses other parameters."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    names = [up, "down_proj"] + ([f"{up}_bias", "down_proj_bias"] if module.has_bias else [])
    norm = module.post_expert_norm.named_parameters() if module.has_post_expert_norm else ()
    shared = {f"post_expert_norm_{name}": f"post_expert_norm.{name}" for name, _ in norm}
    ordered = [name for name in module._parameters if name in names]  # the order of the records
    return ExpertsForm({name: name for name in ordered}, _compute, shared=shared)


def _compute(module: Any, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
    """transformers' rule for one expert, as its own batched forms have it: linear, gate, linear, norm."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        y = x @ (tensors[name] if module.is_transposed else tensors[name].T)
        return y + tensors[f"{name}_bias"] if module.has_bias else y

    y = linear(x, "gate_up_proj" if module.has_gate else "up_proj")
    y = linear(module._apply_gate(y) if module.has_gate else module.act_fn(y), "down_proj")
    if not module.has_post_expert_norm:
        return y
    prefix = "post_expert_norm_"
    norm = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return torch.func.functional_call(module.post_expert_norm, norm, (y,))


@dataclass(frozen=True)
class MoeModule:
    """A module with routed experts: its place in the model, its form, and one expert's shapes by tensor name."""

    name: str
    module: Any  # torch.nn.Module
    form: ExpertsForm
    shapes: Mapping[str, tuple[int, ...]]
    n_experts: int
    hidden_size: int  # of the model; what comes out of the module

    @classmethod
    def of(cls, name: str, module: torch.nn.Module, hidden_size: int) -> MoeModule:
        """Raises UnsupportedModel for parameters that the form does not account for."""
        form = form_of(module)
        assert form is not None
        parameters = dict(module.named_parameters())
        counts = {_count(path, parameters) for path in form.weights.values()}
        leftover = [] if form.forward else sorted({*parameters} - {*form.weights.values(), *form.shared.values()})
        if len(counts) != 1 or 0 in counts or leftover:
            raise UnsupportedModel(
                f"{name} has experts of a form that is not supported (parameters {sorted(parameters)[:8]})",
                "Choose another architecture, or register its form (docs/OWN_MODEL.md).",
            )
        shapes = {tensor: _shape(path, parameters) for tensor, path in form.weights.items()}
        shapes |= {tensor: tuple(parameters[path].shape) for tensor, path in form.shared.items()}
        return cls(name, module, form, shapes, counts.pop(), hidden_size)

    def parameter(self, tensor: str, expert: int) -> tuple[str, bool]:
        """The full name of the parameter that holds an expert's tensor, and whether it holds all experts'."""
        path = self.form.weights[tensor]
        return f"{self.name}.{path.replace(_NUMBER, str(expert))}", _NUMBER not in path

    def parameters(self) -> Iterator[str]:
        """The full names of the parameters that hold nothing but experts."""
        for tensor, path in self.form.weights.items():
            for expert in range(self.n_experts if _NUMBER in path else 1):
                yield self.parameter(tensor, expert)[0]

    def signature(self) -> tuple[Any, ...]:
        """Equal for modules whose experts share one graph."""
        plain = (bool, int, float, str, type(None))
        settings = {k: v for k, v in self.module.__dict__.items() if isinstance(v, plain) and not _is_index(k)}
        children = tuple((name, repr(child)) for name, child in self.module.named_children())
        return (
            self.module.__class__,
            tuple(sorted(self.shapes.items())),
            tuple(sorted(settings.items(), key=str)),
            children,
        )


def _is_index(attribute: str) -> bool:
    return "layer" in attribute or attribute == "training"


def _count(path: str, parameters: Mapping[str, torch.nn.Parameter]) -> int:
    if _NUMBER in path:
        return sum(path.replace(_NUMBER, str(number)) in parameters for number in range(len(parameters)))
    return parameters[path].shape[0] if path in parameters else 0


def _shape(path: str, parameters: Mapping[str, torch.nn.Parameter]) -> tuple[int, ...]:
    whole = tuple(parameters[path.replace(_NUMBER, "0")].shape)
    return whole if _NUMBER in path else whole[1:]


def bare(module: torch.nn.Module) -> torch.nn.Module:
    """A copy without parameters and buffers: what an expert computes must not depend on the layer that it is in."""
    twin = copy.copy(module)
    children = {name: None if child is None else bare(child) for name, child in module._modules.items()}
    nothing = dict.fromkeys(module._parameters)  # None rather than absent, since a module's repr reads them
    twin.__dict__ = {**module.__dict__, "_parameters": nothing, "_buffers": {}, "_modules": children}
    return twin
