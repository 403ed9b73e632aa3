"""Time from bytes moved and operations done: the roofline model, for rented GPUs and for devices that page experts.

    step = max(bytes / (eta bandwidth), operations / (eta_c peak)) + overhead [+ missed bytes / disk bandwidth]

Everything here is a prediction, and whoever shows it says so. The efficiencies are checked against published figures
in the tests and in docs/LOG.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pocketmoe.profiles.catalogue.clouds import Gpu
    from pocketmoe.profiles.estimate.shapes import Shape
    from pocketmoe.profiles.profile import Profile

MEMORY_EFFICIENCY = 0.6
COMPUTE_EFFICIENCY = 0.4
_STEP_OVERHEAD_S = 1e-3  # scheduling and sampling
_LAYER_OVERHEAD_S = 0.08e-3  # launching kernels
_KV_BYTES = 2  # of a value in a server's cache
_USABLE_MEMORY = 0.9  # what a server takes of a GPU's memory by default
SERVED_BITS = (16, 8, 4)  # what weights are served in, the best first


@dataclass(frozen=True)
class Served:
    """What serving a model moves and computes, in parameters; `read_parameters`: of the dense part, for each token."""

    parameters: int
    read_parameters: int
    moe_layers: int
    experts: int
    top_k: int
    expert_parameters: int
    layers: int
    kv_values_per_token: float

    @property
    def active_parameters(self) -> int:
        """What one token is multiplied with."""
        return self.read_parameters + self.moe_layers * self.top_k * self.expert_parameters


def served(shape: Shape) -> Served:
    """A model as a server holds it. An embedding of its own is read by rows, which is nothing."""
    dense = sum(shape.dense.values())
    rows_only = shape.dense.get("embedding", 0) if shape.dense.get("head", 0) else 0
    return Served(
        parameters=shape.parameters,
        read_parameters=dense - rows_only,
        moe_layers=shape.moe_layers,
        experts=shape.experts,
        top_k=shape.top_k,
        expert_parameters=shape.expert_parameters,
        layers=shape.layers,
        kv_values_per_token=shape.served_kv_values_per_token,
    )


def served_of_profile(profile: Profile) -> Served:
    """The same of what was profiled: parameters from bytes, by the bits that its schemes take."""
    model = profile.model
    layers = len(model.experts)
    each = round(model.expert_read_bytes * 8 / scheme_bits(model.schemes.get("experts", "fp32")))
    dense = round(model.dense_bytes * 8 / scheme_bits(model.schemes.get("attention", "fp32")))
    return Served(
        parameters=model.parameters,
        read_parameters=dense,
        moe_layers=layers,
        experts=round(sum(model.experts) / layers),
        top_k=round(sum(model.experts_per_token) / layers),
        expert_parameters=each,
        layers=layers,
        kv_values_per_token=model.state_bytes_per_token / 4,
    )


def scheme_bits(scheme: str) -> float:
    """Bits of a weight in `int4-b64-asym` or `nf4-b64`: its code, and its part of a block's scale (and zero point).

    Where a label names several formats, their mean: it does not say how many weights are in each.
    """
    found = re.findall(r"(?:int(\d+)|nf4|fp4)-b(\d+)(-asym)?", scheme)
    if not found:
        return 32.0
    bits = [(int(width or 4), int(block), bool(asymmetric)) for width, block, asymmetric in found]
    return fmean(width + (32 + width * asymmetric) / block for width, block, asymmetric in bits)


def distinct_experts(experts: int, top_k: int, tokens: float) -> float:
    """How many of a layer's experts so many tokens touch under uniform routing: real routing touches fewer."""
    return experts * (1 - (1 - top_k / experts) ** tokens)


def step_s(
    nbytes: float,
    operations: float,
    bytes_per_s: float,
    operations_per_s: float,
    overhead_s: float = 0.0,
    memory_efficiency: float = MEMORY_EFFICIENCY,
    compute_efficiency: float = COMPUTE_EFFICIENCY,
) -> float:
    """Seconds of a step that is bound by its slower side."""
    moving = nbytes / (memory_efficiency * bytes_per_s)
    return max(moving, operations / (compute_efficiency * operations_per_s)) + overhead_s


@dataclass(frozen=True)
class Serving:
    """A model on some GPUs of an instance, for so many users at once. Rates count output tokens, prompts included."""

    bits: int
    gpus: int  # that hold one copy of the model
    users: int
    ttft_s: float
    step_s: float
    tokens_per_s: float  # of all users of one copy together

    @property
    def tokens_per_s_per_user(self) -> float:
        return self.tokens_per_s / self.users


def fit_gpus(model: Served, gpu: Gpu, gpus: int, context: int) -> tuple[int, int] | None:
    """The bits and the fewest GPUs that hold the weights and one text; the best bits that the instance has room for."""
    for bits in SERVED_BITS:
        n = 1
        while n <= gpus:
            if _users_that_fit(model, gpu, n, bits, context) >= 1:
                return bits, n
            n *= 2  # tensor parallelism splits heads evenly
    return None


def serve(model: Served, gpu: Gpu, gpus: int, bits: int, users: int, prompt_tokens: int, output_tokens: int) -> Serving:
    """Predict one copy on `gpus` GPUs; of `users`, as many as there is memory for.

    A request takes its prompt's time alone and then its share of `output_tokens` steps with the others.
    """
    users = max(1, min(users, int(_users_that_fit(model, gpu, gpus, bits, prompt_tokens + output_tokens))))
    prompt = _gpu_step_s(model, gpu, gpus, bits, prompt_tokens, 0)
    step = _gpu_step_s(model, gpu, gpus, bits, users, users * (prompt_tokens + output_tokens / 2))
    return Serving(
        bits=bits,
        gpus=gpus,
        users=users,
        ttft_s=prompt + (step if users > 1 else 0),
        step_s=step,
        tokens_per_s=output_tokens / (prompt + output_tokens * step / users),
    )


def _users_that_fit(model: Served, gpu: Gpu, gpus: int, bits: int, context: int) -> float:
    available = _USABLE_MEMORY * gpu.memory_bytes * gpus - model.parameters * bits / 8
    return available / max(1, context * model.kv_values_per_token * _KV_BYTES)


def _gpu_step_s(model: Served, gpu: Gpu, gpus: int, bits: int, tokens: float, cached_tokens: float) -> float:
    """Seconds of a step with `tokens` new tokens over caches of `cached_tokens` in all."""
    touched = distinct_experts(model.experts, model.top_k, tokens)
    weights = model.read_parameters + model.moe_layers * touched * model.expert_parameters
    nbytes = weights * bits / 8 + cached_tokens * model.kv_values_per_token * _KV_BYTES
    operations = 2 * tokens * model.active_parameters
    return step_s(
        nbytes,
        operations,
        gpus * gpu.bandwidth_bytes_per_s,
        gpus * gpu.dense_flops_per_s,
        _STEP_OVERHEAD_S + model.layers * _LAYER_OVERHEAD_S,
    )
