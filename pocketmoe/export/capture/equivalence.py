"""The captured graph of one expert against the module that it comes from, on real weights and random rows.

An architecture whose experts are not summed with their routing weights, or a registered form that does not say what its
module does, is found out here, before a bundle is written. No more than two experts are in memory.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch

from pocketmoe.bundle.manifest import Equivalence
from pocketmoe.errors import UnsupportedModel
from pocketmoe.export.capture.adapters import MoeModule
from pocketmoe.ort import Session, session_options

TOLERANCE = 1e-4
ROWS = 6

Samples = Sequence[Mapping[str, torch.Tensor]]  # one or two experts' tensors, as their module's parameters hold them
Run = Callable[[int, np.ndarray], np.ndarray]  # number of the sample, x [rows, width] -> y [rows, width]


def expert_width(moe: MoeModule) -> int:
    """The width of what goes into an expert and comes out of it."""
    if moe.form.forward is None:
        down = moe.shapes["down_proj"]
        return down[1] if moe.module.is_transposed else down[0]
    seen: list[int] = []

    def experts(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[-1])
        return torch.zeros_like(x)

    _call(moe.form.forward, moe.module, experts, torch.zeros(1, ROWS, moe.hidden_size))
    return seen[0]


def check_equivalence(
    moe: MoeModule, samples: Samples, graph: ir.Model, records: Mapping[str, list[bytearray]]
) -> float:
    """The largest difference of the module's own forward from the weighted sum of what `graph` computes.

    As a share of the largest output. Raises UnsupportedModel where it is beyond the tolerance.

    `records` has the samples' bytes under the name of the file that the graph's weights refer to.
    """
    sessions = _sessions(graph, records)

    def run(sample: int, x: np.ndarray) -> np.ndarray:
        return sessions[sample].run(["y"], {"x": x})[0]

    expected, found = (_interface if moe.form.forward is None else _registered)(moe, samples, run)
    scale = max(float(np.abs(expected).max()), 1e-6)
    if not np.allclose(found / scale, expected / scale, rtol=TOLERANCE, atol=TOLERANCE):
        raise UnsupportedModel(
            f"{moe.name} ({type(moe.module).__name__}) does not compute the weighted sum of its experts' outputs",
            "Its experts cannot be run one by one (for example, because routing weights apply to their input).",
        )
    return float(np.abs(found - expected).max()) / scale


def summed_up(kinds: int, experts: int, errors: Sequence[float]) -> Equivalence:
    """The record of it; an error as a power of ten, which does not depend on the order of sums."""
    largest = max([1e-12, *errors])
    return Equivalence(
        kinds=kinds,
        experts=experts,
        rows=ROWS,
        tolerance=TOLERANCE,
        error_below=float(f"1e{math.floor(math.log10(largest)) + 1}"),
    )


def _sessions(graph: ir.Model, records: Mapping[str, list[bytearray]]) -> list[Session]:
    options = session_options(threads=0)
    sessions: list[Session] = []
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "expert.onnx"
        ir.save(graph, model)
        for name, contents in records.items():
            for data in contents:
                (Path(directory) / name).unlink(missing_ok=True)  # the session before may have it mapped
                (Path(directory) / name).write_bytes(data)
                sessions.append(Session(str(model), options, "the graph of an expert"))
    return sessions


def _interface(moe: MoeModule, samples: Samples, run: Run) -> tuple[np.ndarray, np.ndarray]:
    """transformers' eager forward with the samples as the module's only experts, and the same by graph."""
    n, rng = len(samples), np.random.default_rng(0)
    x = rng.standard_normal((ROWS, expert_width(moe))).astype(np.float32)
    ids = np.stack([rng.permutation(n) for _ in x])
    routing = rng.uniform(0.2, 0.9, ids.shape).astype(np.float32)
    twin: Any = copy.copy(moe.module)
    stacked = {path: torch.stack([tensors[name] for tensors in samples]) for name, path in moe.form.weights.items()}
    parameters = {path: torch.nn.Parameter(tensor, requires_grad=False) for path, tensor in stacked.items()}
    twin.__dict__ = {**vars(moe.module), "_parameters": parameters}
    if hasattr(twin, "num_experts"):
        twin.num_experts = n
    forward = cast("Any", type(moe.module)).forward.__wrapped__  # beneath transformers' decorator
    expected = _call(forward, twin, *(torch.from_numpy(array) for array in (x, ids, routing)))
    weight_of = np.zeros((len(x), n), np.float32)
    np.put_along_axis(weight_of, ids, routing, axis=1)
    return expected.numpy(), np.asarray(sum(run(e, x) * weight_of[:, [e]] for e in range(n)))


def _registered(moe: MoeModule, samples: Samples, run: Run) -> tuple[np.ndarray, np.ndarray]:
    """The module's own forward with the samples in every expert's place, and the registered one with the graph.

    Parameters that stack all experts are one sample seen many times, which takes no memory; else the two take turns.
    """
    stacks = any(moe.parameter(name, 0)[1] for name in moe.form.weights)
    n = 1 if stacks else len(samples)
    parameters = {}
    for name in moe.form.weights:
        for expert in range(moe.n_experts):
            path, whole = moe.parameter(name, expert)
            tensor = samples[expert % n][name]
            tensor = tensor.unsqueeze(0).expand(moe.n_experts, *tensor.shape) if whole else tensor
            parameters[path.removeprefix(f"{moe.name}.")] = tensor
    x = torch.randn(1, ROWS, moe.hidden_size, generator=torch.Generator().manual_seed(0))

    def experts(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        outputs = [torch.from_numpy(run(sample, x.numpy())) for sample in range(n)]
        chosen = torch.stack(outputs)[ids % n, torch.arange(len(x))[:, None]]
        return (chosen * weights.unsqueeze(-1)).sum(dim=1)

    assert moe.form.forward is not None
    expected = _call(torch.func.functional_call, moe.module, parameters, (x,))
    return expected.numpy(), _call(moe.form.forward, moe.module, experts, x).numpy()


def _call(forward: Callable[..., Any], *arguments: Any) -> torch.Tensor:
    """A forward's hidden states, which may be the first of several results."""
    with torch.no_grad():
        result: torch.Tensor | tuple[torch.Tensor, ...] = forward(*arguments)
    return result[0] if isinstance(result, tuple) else result
