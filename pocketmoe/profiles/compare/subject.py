"""What is compared: a model on a device, at budgets that were measured (a profile) or predicted (a plan)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from pocketmoe.bundle.files import read_whole
from pocketmoe.errors import BadInput, DamagedFile
from pocketmoe.profiles.compare.cost import Work
from pocketmoe.profiles.estimate.roofline import Served, served_of_profile
from pocketmoe.profiles.profile import Profile, Run

_MAX_PLAN_BYTES = 4 << 20
_REMEDY = "Make one: pocketmoe plan MODEL --device NAME --json > PLAN.json."
_PLAN_OUTPUT_TOKENS = 256  # of an answer; a plan knows prompts alone

_Count = Annotated[int, msgspec.Meta(ge=1, lt=1 << 53)]
_Rate = Annotated[float, msgspec.Meta(gt=0, le=1e12)]


@dataclass(frozen=True)
class Budget:
    """The device with so much memory. `watts`: measured while it worked, None where nothing tells."""

    name: str
    memory_budget_bytes: int
    ttft_s: float
    tokens_per_s: float  # decoding
    how: str
    watts: float | None = None
    watts_label: str = ""


@dataclass(frozen=True)
class Subject:
    """A model on a device; everything that a comparison needs of it. `catalogue`: the device's name there, if known."""

    device: str
    model: str
    parameters: int
    work: Work
    served: Served
    budgets: tuple[Budget, ...]
    basis: Literal["measured", "predicted"]
    source: str  # the file
    catalogue: str = ""
    notes: tuple[str, ...] = ()


def subject_of_profile(profile: Profile) -> Subject:
    """Its measured budgets. Raises BadInput where it has none."""
    runs = [run for run in profile.runs if run.read_bytes_per_s is None]
    if not runs:
        raise BadInput("the profile has no measured budget yet", "Measure one: pocketmoe profile BUNDLE -o DIR.")
    source = profile.model.source
    return Subject(
        device=profile.machine.cpu,
        model=source if "/" in source else profile.model.name,
        parameters=profile.model.parameters,
        work=Work(profile.workload.prompt_tokens, profile.workload.output_tokens),
        served=served_of_profile(profile),
        budgets=tuple(map(_measured, runs)),
        basis="measured",
        source="profile.json",
    )


def _measured(run: Run) -> Budget:
    return Budget(
        name=run.memory,
        memory_budget_bytes=run.memory_budget_bytes,
        ttft_s=run.ttft_s,
        tokens_per_s=run.mean_tokens_per_s,
        how=f"{run.memory_budget_bytes / 1e6:.0f} MB, {run.hit_rate:.0%} of experts in memory when wanted",
        watts=run.energy.watts,
        watts_label=run.energy.label if run.energy.watts is not None else "",
    )


class _Speed(msgspec.Struct, frozen=True):
    tokens_per_s: _Rate
    tokens_per_s_low: _Rate
    tokens_per_s_high: _Rate
    ttft_s: _Rate
    ttft_warm_s: _Rate | None = None


class _Candidate(msgspec.Struct, frozen=True):
    scheme: str
    memory_bytes: _Count
    fits: bool
    speed: _Speed
    kv: str = "float32"


class _Advice(msgspec.Struct, frozen=True):
    fastest: _Candidate | None = None
    best_quality: _Candidate | None = None
    least_memory: _Candidate | None = None


class _Plan(msgspec.Struct, frozen=True):
    """What is read of a plan's JSON; the rest of it is passed over."""

    model: str
    device: str
    device_title: str
    parameters: _Count
    active_parameters: _Count
    moe_layers: _Count
    experts: _Count
    experts_per_token: _Count
    prompt_tokens: _Count
    candidates: tuple[_Candidate, ...]
    recommended: _Candidate | None = None
    advice: _Advice = _Advice()
    loaded: bool = False
    expert_parameters: _Count = 0


def read_plan(path: Path) -> Subject:
    """The JSON that `plan --json` prints, where something fits. Raises BadInput or DamagedFile."""
    data = read_whole(path, _MAX_PLAN_BYTES, _REMEDY)
    try:
        plan = msgspec.json.decode(data, type=_Plan)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedFile(path, f"is no plan ({error})", _REMEDY) from error
    names = (
        plan.model,
        plan.device,
        plan.device_title,
        *(name for found in plan.candidates for name in (found.scheme, found.kv)),
    )
    if not all(text.isprintable() for text in names):
        raise DamagedFile(path, "holds control characters, which could steer a terminal", _REMEDY)
    if plan.experts_per_token >= plan.experts or plan.active_parameters >= plan.parameters:
        raise DamagedFile(path, "counts more of a token's parameters than of the model's", _REMEDY)
    chosen = _chosen(plan)
    if not chosen:
        raise BadInput(f"{path}: nothing of that plan fits {plan.device}", "Plan for another device or scheme.")
    return Subject(
        device=plan.device_title,
        model=plan.model,
        parameters=plan.parameters,
        work=Work(plan.prompt_tokens, _PLAN_OUTPUT_TOKENS),
        served=_served(plan),
        budgets=tuple(map(_predicted, chosen)),
        basis="predicted",
        source="plan",
        catalogue=plan.device,
        notes=(
            f"nothing was measured: speeds of the device are the plan's, for answers of {_PLAN_OUTPUT_TOKENS} tokens",
            "GPUs are reckoned without caches of keys and values, whose size a plan does not say",
            *(["others were at work while the plan measured this machine"] if plan.loaded else []),
        ),
    )


def _chosen(plan: _Plan) -> list[_Candidate]:
    """What the plan recommends and names, each once; else the fastest that fits."""
    advice = plan.advice
    named = [
        found
        for found in (plan.recommended, advice.fastest, advice.best_quality, advice.least_memory)
        if found and found.fits
    ]
    fastest = sorted((c for c in plan.candidates if c.fits), key=lambda c: -c.speed.tokens_per_s)[:1]
    return list({(c.scheme, c.kv, c.memory_bytes): c for c in named or fastest}.values())


def _predicted(found: _Candidate) -> Budget:
    """The first token is that of a process that is up already: the same work comes again and again."""
    speed = found.speed
    caches = "" if found.kv == "float32" else f" with caches in {found.kv}"
    return Budget(
        name=f"{found.scheme}{caches} in {found.memory_bytes / 1e9:.2g} GB",
        memory_budget_bytes=found.memory_bytes,
        ttft_s=speed.ttft_warm_s or speed.ttft_s,
        tokens_per_s=speed.tokens_per_s,
        how=f"expected between {speed.tokens_per_s_low:.3g} and {speed.tokens_per_s_high:.3g} tokens/s",
    )


def _served(plan: _Plan) -> Served:
    """Plans up to 2026-11 do not say how large an expert is: there a token leaves out what it is not routed to."""
    left_out = plan.moe_layers * (plan.experts - plan.experts_per_token)
    each = plan.expert_parameters or (plan.parameters - plan.active_parameters) // left_out
    dense = plan.active_parameters - plan.moe_layers * plan.experts_per_token * each
    return Served(
        parameters=plan.parameters,
        read_parameters=max(0, dense),
        moe_layers=plan.moe_layers,
        experts=plan.experts,
        top_k=plan.experts_per_token,
        expert_parameters=each,
        layers=plan.moe_layers,
        kv_values_per_token=0.0,
    )
