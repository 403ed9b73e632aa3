"""One expert's computation as a graph of its own, and the experts' weights as records in the store.

The computation is captured from the form of the module (`forms`), which for transformers' own is made of the module's
gate and activation functions and layout flags; nothing is written per architecture. Before any weight is stored, real
experts are run through the module's own eager forward and through the captured graph (`equivalence`): an architecture
that computes something else with its experts is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from pocketmoe.bundle.manifest import Equivalence, ExpertKind, Tensor, expert_graph
from pocketmoe.bundle.store import ExpertId
from pocketmoe.bundle.stream import ExpertSource
from pocketmoe.errors import BadInput, UnsupportedModel
from pocketmoe.export.capture.adapters import MoeModule, bare
from pocketmoe.export.capture.capture import in_a_thread, quiet
from pocketmoe.export.capture.equivalence import check_equivalence, expert_width, summed_up
from pocketmoe.export.checkpoint.weights import Weights
from pocketmoe.export.cut.coded import Coded
from pocketmoe.export.cut.prepare import plain_matmuls

ALIGNMENT = 64  # of a tensor within its record
RECORD = "record"  # the file that an expert graph's external weights claim to be in


@dataclass(frozen=True)
class CapturedExpert:
    """One kind of expert: its graph, whose weights are external data in a record, and the record's layout."""

    model: ir.Model
    tensors: tuple[Tensor, ...]
    nbytes: int
    transposed: frozenset[str]  # tensors that a record holds the other way round than the module's parameter

    def record(self, tensors: Mapping[str, torch.Tensor]) -> bytearray:
        """An expert's bytes, from its tensors by name, float32 [...] as the module's parameters have them."""
        record = bytearray(self.nbytes)
        for t in self.tensors:
            tensor = tensors[t.name].T if t.name in self.transposed else tensors[t.name]
            view = torch.frombuffer(record, dtype=torch.float32, count=tensor.numel(), offset=t.offset)
            view.view(t.shape).copy_(tensor)  # torch transposes in blocks: 3 ms for 16 MB, numpy 27
        return record


class _OneExpert(torch.nn.Module):
    """y [rows, width] of x [rows, width] for one expert, without its routing weight."""

    def __init__(self, moe: MoeModule) -> None:
        super().__init__()
        self.rules, self.compute, self.names = bare(moe.module), moe.form.compute, tuple(moe.shapes)

    def forward(self, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return self.compute(self.rules, dict(zip(self.names, tensors, strict=True)), x)


def capture_expert(moe: MoeModule) -> CapturedExpert:
    """The graph of one expert, and where in a record its weights will be."""
    width = expert_width(moe)
    # the weights are inputs of the capture: constants would be folded, merged and renamed
    tensors = [torch.zeros(shape) for shape in moe.shapes.values()]
    export = partial(
        torch.onnx.export,
        _OneExpert(moe).eval(),
        (torch.zeros(5, width), *tensors),
        input_names=["x", *moe.shapes],
        output_names=["y"],
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC}, tuple(dict[int, Any]() for _ in tensors)),
        dynamo=True,
        optimize=True,
        verbose=False,
    )
    with quiet():
        program = in_a_thread(export)
    assert program is not None
    model = program.model
    _inputs_to_weights(model.graph, moe)
    plain_matmuls(model)
    for node in model.graph:
        node.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name, model.producer_name, model.producer_version = "expert", "pocketmoe", None
    model.graph.inputs[0].shape = ir.Shape(["rows", width])
    model.graph.outputs[0].shape = ir.Shape(["rows", width])
    return _lay_out(model, moe)


def _inputs_to_weights(graph: ir.Graph, moe: MoeModule) -> None:
    for value in list(graph.inputs)[1:]:
        graph.inputs.remove(value)
        placeholder = np.broadcast_to(np.float32(0), moe.shapes[str(value.name)])  # takes no memory
        value.const_value = ir.Tensor(placeholder, name=value.name)
        graph.register_initializer(value)


def _lay_out(model: ir.Model, moe: MoeModule) -> CapturedExpert:
    """Give each weight its place in the record, in the form in which the graph uses it."""
    initializers = model.graph.initializers
    tensors: list[Tensor] = []
    transposed: set[str] = set()
    offset = 0
    for name, shape in moe.shapes.items():
        used = [key for key in (name, f"{name}.T") if key in initializers and any(initializers[key].uses())]
        if len(used) != 1:
            raise UnsupportedModel(f"{moe.name}: the captured expert does not use {name!r} in one way")
        value = initializers.pop(used[0])
        if used[0] != name:
            transposed.add(name)
            initializers.pop(name, None)
            shape = shape[::-1]
        nbytes = 4 * int(np.prod(shape))
        value.name = name
        value.metadata_props.clear()
        value.const_value = ir.ExternalTensor(
            RECORD, offset, nbytes, ir.DataType.FLOAT, shape=ir.Shape(shape), name=name
        )
        model.graph.register_initializer(value)
        tensors.append(Tensor(name=name, dtype="float32", shape=shape, offset=offset, nbytes=nbytes))
        offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return CapturedExpert(model, tuple(tensors), offset, frozenset(transposed))


def prepare_experts(
    modules: list[MoeModule], weights: Weights, root: Path
) -> tuple[tuple[ExpertKind, ...], ExpertSource, Coded, Equivalence]:
    """Capture each kind of expert into `root`/graphs.

    The kinds, where the experts' records come from, codes, and how graphs were held against the modules.
    """
    kinds: list[ExpertKind] = []
    errors: list[float] = []
    compared = 0
    captured: dict[tuple[Any, ...], tuple[int, CapturedExpert]] = {}
    for moe in modules:
        if moe.signature() in captured:
            continue
        name = expert_graph(len(kinds))
        kind = capture_expert(moe)
        samples = [_load(moe, weights, expert) for expert in range(min(2, moe.n_experts))]
        records = {RECORD: [kind.record(tensors) for tensors in samples]}
        errors.append(check_equivalence(moe, samples, kind.model, records))
        compared += len(samples)
        captured[moe.signature()] = len(kinds), kind
        ir.save(kind.model, root / name)
        kinds.append(ExpertKind(graph=name, input="x", output="y", tensors=kind.tensors, nbytes=kind.nbytes))
    order = {
        ExpertId(layer, expert): captured[moe.signature()][0]
        for layer, moe in enumerate(modules)
        for expert in range(moe.n_experts)
    }

    def read(expert: ExpertId) -> bytearray:
        moe = modules[expert.layer]
        return captured[moe.signature()][1].record(_load(moe, weights, expert.expert))

    transposed = [captured[moe.signature()][1].transposed for moe in modules]
    held = summed_up(len(kinds), compared, errors)
    return tuple(kinds), ExpertSource(order, read), Coded(weights, modules, transposed), held


def _load(moe: MoeModule, weights: Weights, expert: int) -> dict[str, torch.Tensor]:
    """One expert's tensors. Raises BadInput for missing, malformed or non-finite weights."""
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in moe.shapes.items():
        shared = moe.form.shared.get(name)
        if shared is None:
            tensors[name] = weights.load_expert(moe, name, expert)
        else:
            tensors[name] = moe.module.get_parameter(shared).detach()
        if tuple(tensors[name].shape) != shape:
            raise BadInput(
                f"expert {expert} of {moe.name!r}: {name!r} has shape {list(tensors[name].shape)}, "
                f"config.json asks for {list(shape)}",
                "Use the config.json that belongs to these weights.",
            )
    return tensors
