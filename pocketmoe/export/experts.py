"""One expert's computation as a graph of its own, and the experts' weights as records in the store.

The computation is captured from the module's own gate and activation functions and layout flags; nothing is written
per architecture. Before any weight is stored, two real experts are run through the module's own eager forward and
through the captured graph: an architecture that computes something else with its experts is refused.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from pocketmoe.errors import BadInput, UnsupportedModel
from pocketmoe.export.capture import quiet
from pocketmoe.export.prepare import plain_matmuls
from pocketmoe.export.weights import Weights
from pocketmoe.manifest import ExpertKind, Tensor
from pocketmoe.store import ExpertId
from pocketmoe.streaming import Experts

ALIGNMENT = 64  # of a tensor within its record
RECORD = "record"  # the file that an expert graph's external weights claim to be in
_RTOL = 1e-4


@dataclass(frozen=True)
class MoeModule:
    """An experts module of the model: its parameters' full names and shapes [n_experts, ...]."""

    name: str
    module: torch.nn.Module
    shapes: Mapping[str, tuple[int, ...]]
    n_experts: int

    @classmethod
    def of(cls, name: str, module: torch.nn.Module) -> MoeModule:
        """Raises UnsupportedModel for parameters that the experts interface does not know."""
        shapes = {key: tuple(value.shape) for key, value in module._parameters.items() if value is not None}
        up = "gate_up_proj" if module.has_gate else "up_proj"
        wanted = {up, "down_proj"} | ({f"{up}_bias", "down_proj_bias"} if module.has_bias else set())
        if set(shapes) != wanted or len({shape[0] for shape in shapes.values()}) != 1 or module.has_post_expert_norm:
            raise UnsupportedModel(
                f"{name} has experts of a form that is not supported (parameters {sorted(shapes)})",
                "Choose another architecture, or report this one.",
            )
        return cls(name, module, shapes, next(iter(shapes.values()))[0])

    def is_matrix(self, parameter: str) -> bool:
        return not parameter.endswith("_bias")

    def record_shape(self, parameter: str) -> tuple[int, ...]:
        """The shape within a record: matrices are [inputs, outputs]."""
        shape = self.shapes[parameter][1:]
        return shape if self.module.is_transposed or not self.is_matrix(parameter) else shape[::-1]

    def in_record(self, parameter: str, tensor: torch.Tensor) -> torch.Tensor:
        """An expert's tensor in the layout of a record."""
        return tensor if self.module.is_transposed or not self.is_matrix(parameter) else tensor.T

    def signature(self) -> tuple[Any, ...]:
        """Equal for modules whose experts share one graph."""
        plain = (bool, int, float, str, type(None))
        settings = {k: v for k, v in vars(self.module).items() if isinstance(v, plain) and not _is_index(k)}
        children = tuple((name, repr(child)) for name, child in self.module.named_children())
        return (
            type(self.module),
            tuple(sorted(self.shapes.items())),
            tuple(sorted(settings.items(), key=str)),
            children,
        )


def _is_index(attribute: str) -> bool:
    return "layer" in attribute or attribute == "training"


class _OneExpert(torch.nn.Module):
    """y [rows, hidden] of x [rows, hidden] for one expert, without its routing weight."""

    def __init__(self, moe: MoeModule, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.rules = _without_parameters(moe.module)
        for name, tensor in tensors.items():
            self.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rules: Any = self.rules
        hidden = self._linear(x, "gate_up_proj" if rules.has_gate else "up_proj")
        hidden = rules._apply_gate(hidden) if rules.has_gate else rules.act_fn(hidden)
        return self._linear(hidden, "down_proj")

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        y = x @ self.get_parameter(name)
        return y + self.get_parameter(f"{name}_bias") if self.rules.has_bias else y


def _without_parameters(module: torch.nn.Module) -> torch.nn.Module:
    twin = copy.copy(module)
    twin.__dict__ = {**module.__dict__, "_parameters": {}}
    return twin


def layout(moe: MoeModule) -> tuple[tuple[Tensor, ...], int]:
    """The tensors of a record and its length in bytes."""
    tensors, offset = [], 0
    for name in moe.shapes:
        shape = moe.record_shape(name)
        nbytes = 4 * int(np.prod(shape))
        tensors.append(Tensor(name=name, dtype="float32", shape=shape, offset=offset, nbytes=nbytes))
        offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return tuple(tensors), offset


def capture_expert(moe: MoeModule) -> ir.Model:
    """The graph of one expert, its weights still placeholders."""
    tensors, _ = layout(moe)
    random = torch.Generator().manual_seed(0)  # equal placeholders would be merged into one
    module = _OneExpert(moe, {t.name: torch.rand(t.shape, generator=random) for t in tensors}).eval()
    hidden = moe.record_shape("down_proj")[1]
    rows = torch.export.Dim.DYNAMIC
    with quiet():
        program = torch.onnx.export(
            module,
            (torch.zeros(5, hidden),),
            input_names=["x"],
            output_names=["y"],
            dynamic_shapes=({0: rows},),
            dynamo=True,
            optimize=True,
            verbose=False,
        )
    assert program is not None
    model = program.model
    plain_matmuls(model)
    for node in model.graph:
        node.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name, model.producer_name, model.producer_version = "expert", "pocketmoe", None
    model.graph.inputs[0].shape = ir.Shape(["rows", hidden])
    model.graph.outputs[0].shape = ir.Shape(["rows", hidden])
    _refer_to_record(model, tensors)
    return model


def _refer_to_record(model: ir.Model, tensors: tuple[Tensor, ...]) -> None:
    """The weights become external data in the record, at the places of `tensors`."""
    initializers = model.graph.initializers
    missing = [t.name for t in tensors if t.name not in initializers]
    if missing:
        raise UnsupportedModel(f"the captured expert does not use {missing[0]!r}")
    for t in tensors:
        value = initializers[t.name]
        value.metadata_props.clear()
        value.const_value = ir.ExternalTensor(
            RECORD, t.offset, t.nbytes, ir.DataType.FLOAT, shape=ir.Shape(t.shape), name=t.name
        )


def prepare_experts(modules: list[MoeModule], weights: Weights, root: Path) -> tuple[tuple[ExpertKind, ...], Experts]:
    """Capture each kind of expert into `root`/graphs; the kinds, and where the experts' records come from."""
    kinds: list[ExpertKind] = []
    kind_of: dict[tuple[Any, ...], int] = {}
    for moe in modules:
        if moe.signature() in kind_of:
            continue
        kind_of[moe.signature()] = len(kinds)
        name = f"graphs/expert_{len(kinds)}.onnx"
        tensors, nbytes = layout(moe)
        model = capture_expert(moe)
        _check_against_module(moe, model, lambda expert, moe=moe: _record(moe, weights, expert))
        ir.save(model, root / name)
        kinds.append(ExpertKind(graph=name, input="x", output="y", tensors=tensors, nbytes=nbytes))
    order = {
        ExpertId(layer, expert): kind_of[moe.signature()]
        for layer, moe in enumerate(modules)
        for expert in range(moe.n_experts)
    }
    return tuple(kinds), Experts(order, lambda e: _record(modules[e.layer], weights, e.expert))


def _record(moe: MoeModule, weights: Weights, expert: int) -> bytearray:
    """One expert's bytes. Raises BadInput for missing, malformed or non-finite weights."""
    tensors, nbytes = layout(moe)
    record = bytearray(nbytes)
    for t in tensors:
        full = f"{moe.name}.{t.name}"
        tensor = moe.in_record(t.name, weights.load_expert(full, expert, moe.n_experts))
        if tuple(tensor.shape) != t.shape:
            raise BadInput(
                f"expert {expert} of {full!r} has shape {list(tensor.shape)}, config.json asks for {list(t.shape)}",
                "Use the config.json that belongs to these weights.",
            )
        view = torch.frombuffer(record, dtype=torch.float32, count=tensor.numel(), offset=t.offset)
        view.view(t.shape).copy_(tensor)  # torch transposes in blocks: 3 ms for 16 MB, numpy 27
    return record


def _check_against_module(moe: MoeModule, model: ir.Model, record: Callable[[int], bytearray]) -> None:
    """The captured graph computes what the module's eager forward does, for two of its experts and random rows."""
    import onnxruntime as ort

    n = min(2, moe.n_experts)
    records = [record(expert) for expert in range(n)]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, moe.record_shape("down_proj")[1])).astype(np.float32)
    ids = np.stack([rng.permutation(n) for _ in x])
    routing = rng.uniform(0.2, 0.9, ids.shape).astype(np.float32)
    expected = _eager(moe, records, x, ids, routing)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    outputs = []
    with tempfile.TemporaryDirectory() as directory:
        ir.save(model, Path(directory) / "expert.onnx")
        for data in records:
            (Path(directory) / RECORD).write_bytes(data)
            session = ort.InferenceSession(Path(directory) / "expert.onnx", options, providers=["CPUExecutionProvider"])
            outputs.append(np.asarray(session.run(["y"], {"x": x})[0]))
    weight_of = np.zeros((len(x), n), np.float32)
    np.put_along_axis(weight_of, ids, routing, axis=1)
    found = sum(y * weight_of[:, [e]] for e, y in enumerate(outputs))
    scale = max(float(np.abs(expected).max()), 1e-6)
    if not np.allclose(found / scale, expected / scale, rtol=_RTOL, atol=_RTOL):
        raise UnsupportedModel(
            f"{moe.name} ({type(moe.module).__name__}) does not compute the weighted sum of its experts' outputs",
            "Its experts cannot be run one by one (for example, because routing weights apply to their input).",
        )


def _eager(moe: MoeModule, records: list[bytearray], x: np.ndarray, ids: np.ndarray, routing: np.ndarray) -> np.ndarray:
    """The module's own forward with the experts of `records` as its only ones."""
    twin: Any = _without_parameters(moe.module)
    tensors, _ = layout(moe)
    for t in tensors:
        count = t.nbytes // 4
        parts = [torch.from_numpy(np.frombuffer(r, np.float32, count, t.offset).reshape(t.shape)) for r in records]
        stacked = torch.stack([moe.in_record(t.name, part) for part in parts])
        twin._parameters[t.name] = torch.nn.Parameter(stacked, requires_grad=False)
    if hasattr(twin, "num_experts"):
        twin.num_experts = len(records)
    forward: Any = vars(type(moe.module).forward)["__wrapped__"]  # beneath transformers' decorator
    with torch.no_grad():
        return forward(twin, torch.from_numpy(x), torch.from_numpy(ids), torch.from_numpy(routing)).numpy()
