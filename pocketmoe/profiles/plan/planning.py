"""Around a plan: the model read from a bundle or a config.json, the machine from devices.toml or measured."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pocketmoe.bundle.manifest import MANIFEST, read_manifest
from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import BadInput, UnsupportedModel
from pocketmoe.profiles.catalogue.devices import find_device, known_devices, read_devices
from pocketmoe.profiles.estimate import footprint as footprints
from pocketmoe.profiles.estimate import shapes
from pocketmoe.profiles.estimate.classes import Machine
from pocketmoe.profiles.estimate.footprint import Footprint
from pocketmoe.profiles.estimate.hit_curve import HitCurve, hit_curve
from pocketmoe.profiles.estimate.shapes import Shape
from pocketmoe.profiles.machine.doctor import examine
from pocketmoe.profiles.machine.load import LoadMeter
from pocketmoe.profiles.plan import advice
from pocketmoe.profiles.plan import plan as policy
from pocketmoe.profiles.plan.making import making_of
from pocketmoe.profiles.plan.plan import PlanReport
from pocketmoe.sizes import in_words
from pocketmoe.system.cpus import physical_cores

THIS = "this"
Counter = Callable[[Path], Mapping[str, int]]
"""From a config.json to parameters by role, for models that cannot be counted from fields (export/counting.py)."""


@dataclass(frozen=True)
class PlanRequest:
    """What is asked. `device`: a name of devices.toml or of the file `devices`, or `this`.

    `name`: what to call the model, where its directory does not.
    """

    path: Path
    device: str
    target_tokens_per_s: float | None = None
    context_tokens: int = 2048
    prompt_tokens: int = 128
    reserve_bytes: int | None = None  # for the system and others
    devices: Path | None = None
    name: str | None = None
    sequences: int = 1  # texts at once, each with memory for the context


def make_plan(request: PlanRequest, count: Counter | None = None, progress: Progress = no_progress) -> PlanReport:
    """Raises BadInput for what is neither bundle nor configuration, an unknown device, or no memory left of it."""
    shape, found = read_model(request.path, count)
    machine = _machine(request, progress)
    if machine.usable_bytes <= 0:
        raise BadInput(
            f"{in_words(request.reserve_bytes or 0)} kept for the system leave nothing of the "
            f"{in_words(machine.memory_bytes)} of {machine.name}",
            "Give a smaller --reserve.",
        )
    context = min(request.context_tokens, shape.context_length)
    found = [replace(footprint, sequences=request.sequences) for footprint in found]
    if footprints.takes_int8_caches(shape):
        found = policy.with_int8_caches(found, context)
    prompt = min(request.prompt_tokens, context)
    progress("replaying routing", 0, 1)
    hits = hit_curve(shape)
    options = policy.candidates(found, hits, machine, context, prompt)
    chosen = advice.advise(options, request.target_tokens_per_s)
    best = advice.recommend(chosen)
    remedy = None
    if best is None:
        remedy = advice.remedy(found, hits, machine, context, prompt, request.target_tokens_per_s)
    named = best or next(c for c in options if remedy and (c.scheme, c.kv) == (remedy.scheme, remedy.kv))
    footprint = next(each for each in found if (each.scheme, each.kv) == (named.scheme, named.kv))
    return PlanReport(
        model=request.name or (request.path if request.path.is_dir() else request.path.parent).resolve().name,
        architecture=shape.architecture,
        counted_from=shape.counted_from,
        parameters=shape.parameters,
        active_parameters=shape.active_parameters,
        expert_parameters=shape.expert_parameters,
        moe_layers=shape.moe_layers,
        experts=shape.experts,
        experts_per_token=shape.top_k,
        context_tokens=context,
        asked_context_tokens=request.context_tokens,
        prompt_tokens=prompt,
        sequences=request.sequences,
        device=machine.name,
        device_title=machine.title,
        device_memory_bytes=int(machine.memory_bytes),
        usable_memory_bytes=int(machine.usable_bytes),
        device_basis=machine.basis,
        device_note=machine.note,
        routing=_about_routing(hits),
        target_tokens_per_s=request.target_tokens_per_s,
        candidates=tuple(options),
        recommended=best,
        advice=chosen,
        remedy=remedy,
        asked_prompt_tokens=request.prompt_tokens,
        measured_on=footprints.MEASURED_ON,
        making=making_of(request.path, shape, footprint, machine),
        loaded=machine.loaded,
        device_disk_free_bytes=None if machine.disk_free_bytes is None else int(machine.disk_free_bytes),
    )


def read_model(path: Path, count: Counter | None = None) -> tuple[Shape, list[Footprint]]:
    """The shape, and what it takes in each scheme. Raises BadInput, DamagedFile or UnsupportedModel."""
    manifest = path if path.name == MANIFEST else None  # alone, as it is downloaded from the hub
    if manifest or (path / MANIFEST).exists():
        bundle = Bundle(path.parent, read_manifest(manifest)) if manifest else Bundle.open(path)
        return footprints.shape_of_bundle(bundle), footprints.footprints_of_bundle(bundle)
    config = shapes.read_config(path)
    file = path / "config.json" if path.is_dir() else path
    shapes.check_bounds(config, str(file))
    shapes.refuse_dense(config, str(file))
    try:
        shape = shapes.shape_of_config(config, str(file))
    except UnsupportedModel:
        if count is None:
            raise
        shape = shapes.shape_of_counts(config, count(file), str(file))
    return shape, footprints.footprints_of_shape(shape)


def _about_routing(hits: HitCurve) -> str:
    if hits.own:
        return f"hit rates replayed with the statistics of {hits.statistics}, fitted to this architecture"
    return f"hit rates replayed with the statistics of {hits.statistics}, the most alike of those fitted: an assumption"


def _machine(request: PlanRequest, progress: Progress) -> Machine:
    name = request.device.lower()
    if name != THIS:
        devices = known_devices() | (read_devices(request.devices) if request.devices else {})
        return policy.machine_of_device(name, find_device(name, devices, [THIS]), request.reserve_bytes)
    threads = physical_cores()
    report = examine(Path(), progress, threads=[threads])
    watch = LoadMeter()
    flops = _sgemm_flops_per_s()
    free = shutil.disk_usage(Path()).free
    machine = policy.machine_here(report, flops, threads, request.reserve_bytes, free)
    load = max(report.load, watch.load(), key=lambda found: found.rank)
    if not (load.is_busy or report.load.is_busy):
        return machine
    words = load.in_words()
    note = f"{words[0].upper()}{words[1:]} while this was measured: the range is wider. Ask again when idle."
    return replace(machine, measured=False, loaded=True, note=note)


def _sgemm_flops_per_s(size: int = 768) -> float:
    """The fastest of a few float32 matrix products, in some 0.1 s."""
    a = np.random.default_rng(0).random((size, size), np.float32)
    _ = a @ a
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        _ = a @ a
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
