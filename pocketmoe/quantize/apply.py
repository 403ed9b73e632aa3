"""Quantizes a bundle into another of the same format.

Experts stream through, a few records at a time, quantized on every core; their order in the file, and so its bytes,
do not depend on how many cores there are.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import onnx_ir
import onnxruntime

import pocketmoe
from pocketmoe.bundle import Bundle, BundleWriter, Progress, no_progress
from pocketmoe.errors import BadInput
from pocketmoe.manifest import DENSE, STORE, Manifest, Provenance
from pocketmoe.quantize import dense, experts
from pocketmoe.quantize.caches import CacheCalibration, quantize_caches
from pocketmoe.quantize.gates import check_share
from pocketmoe.quantize.recipes import Scheme, find_scheme
from pocketmoe.store import ExpertId, StoreReader, StoreWriter, translate_write_errors

KEEP = "keep"  # the scheme that leaves weights as they are

Result = TypeVar("Result")


def quantize_bundle(
    source: Path,
    target: Path,
    *,
    scheme: str,
    caches: CacheCalibration | None = None,
    progress: Progress = no_progress,
    workers: int | None = None,
) -> Bundle:
    """Write `source`, a bundle of float32 weights, quantized to `target`; return the new bundle.

    `scheme`: int8 or int4 (`recipes`), or `keep`, which leaves the weights as they are, be they quantized already.
    `caches`: what key and value caches in int8 are made by; without it they stay float32.
    `workers`: threads, by default one per core; the result does not depend on it.
    In memory are a few experts per worker, and the largest dense tensors.
    Raises BadInput for an unknown scheme, a source that is quantized already or is the target itself, NaN or infinite
    weights or ranges; DamagedFile; OutputError; GateFailed when an expert or matrix comes out too far from what it was.
    Whatever it raises, the target is as it was before.
    """
    recipe = None if scheme == KEEP else find_scheme(scheme)
    bundle = Bundle.open(source)
    if recipe:
        _refuse_quantized(bundle)
    elif not caches:
        raise BadInput(f"scheme {KEEP!r} leaves the weights as they are", "Choose int8 or int4, or add --kv int8.")
    if Path(target).resolve() == bundle.root.resolve():
        raise BadInput(f"{target} is the bundle to be quantized", "Name another output directory.")
    bundle.check_all_but_store()
    with BundleWriter(target) as writer, ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        try:
            with translate_write_errors(writer.target):
                copy = _write(bundle, writer.root, recipe, pool, progress) if recipe else _copy(bundle, writer.root)
                manifest = quantize_caches(writer.root, copy, caches) if caches else copy
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        return writer.publish(manifest, progress)


def _refuse_quantized(bundle: Bundle) -> None:
    schemes = {kind.scheme for kind in bundle.manifest.expert_kinds} | {t.scheme for t in bundle.manifest.dense}
    if schemes != {"fp32"}:
        found = ", ".join(sorted(schemes - {"fp32"}))
        raise BadInput(f"{bundle.root} is quantized already ({found})", "Quantize the bundle that was exported.")


def _write(bundle: Bundle, root: Path, scheme: Scheme, pool: ThreadPoolExecutor, progress: Progress) -> Manifest:
    """Write every file but the manifest; return the manifest."""
    old = bundle.manifest
    plan = dense.DensePlan(bundle, scheme)
    kinds = [experts.KindQuantizer(bundle, kind, scheme.experts, scheme.accuracy_level) for kind in old.expert_kinds]
    _copy_the_rest(bundle, root)
    plan.write_graphs(root)
    for kind in kinds:
        (root / kind.kind.graph).write_bytes(kind.graph)
    check_share([root / name for name in dense.graph_names(old)], plan.planned_bytes)
    for kind in kinds:
        check_share([root / kind.kind.graph], kind.planned_bytes)
    if old.dense:
        _write_dense(bundle.path(DENSE), root / DENSE, plan, pool, progress)
    with bundle.open_store() as store:
        index_sha256, reports = _write_experts(store, root / STORE, kinds, pool, progress)
    worst = max(reports, key=lambda report: report.output_error)
    step = f"quantize {scheme.describe()}; worst expert: {worst.name}, output off by {worst.output_error:.4f}"
    return msgspec.structs.replace(
        old,
        expert_kinds=tuple(kind.kind for kind in kinds),
        dense=plan.tensors(),
        store_index_sha256=index_sha256,
        notes=(*old.notes, *plan.notes),
        provenance=msgspec.structs.replace(_with_tools(old.provenance), steps=(*old.provenance.steps, step)),
    )


def _copy(bundle: Bundle, root: Path) -> Manifest:
    """Write every file but the manifest as it is; return the manifest."""
    for name in bundle.manifest.files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path(name), root / name)
    return msgspec.structs.replace(bundle.manifest, provenance=_with_tools(bundle.manifest.provenance))


def _with_tools(provenance: Provenance) -> Provenance:
    modules = {"onnx-ir": onnx_ir, "onnxruntime": onnxruntime, "numpy": np, "pocketmoe": pocketmoe}
    versions = {f"{name} (quantize)": module.__version__ for name, module in modules.items()}
    return msgspec.structs.replace(provenance, tools={**provenance.tools, **versions})


def _copy_the_rest(bundle: Bundle, root: Path) -> None:
    """Tokenizer, model card and whatever else quantizing does not change."""
    changed = {DENSE, STORE, *dense.graph_names(bundle.manifest)}
    changed |= {kind.graph for kind in bundle.manifest.expert_kinds}
    for name in bundle.manifest.files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name not in changed:
            shutil.copyfile(bundle.path(name), root / name)


def _write_dense(
    source: Path, target: Path, plan: dense.DensePlan, pool: ThreadPoolExecutor, progress: Progress
) -> None:
    with open(target, "wb") as file:
        for done, chunks in enumerate(in_order(pool, plan.jobs(source))):
            progress("quantizing dense weights", done, len(plan.entries))
            for offset, data in chunks:
                file.seek(offset)
                file.write(data)
        file.truncate(plan.nbytes)
    progress("quantizing dense weights", len(plan.entries), len(plan.entries))


def _write_experts(
    store: StoreReader, target: Path, kinds: list[experts.KindQuantizer], pool: ThreadPoolExecutor, progress: Progress
) -> tuple[str, list[experts.ExpertReport]]:
    """Quantize every expert in the order of the source; return the index's hash and what was measured of each."""

    def job(expert: ExpertId) -> tuple[bytearray, experts.ExpertReport]:
        name = f"layer {expert.layer}, expert {expert.expert}"
        return kinds[store.records[expert].kind].convert(store.read(expert), name)

    reports = []
    with StoreWriter(target) as writer:
        jobs = (lambda expert=expert: job(expert) for expert in store.records)
        for expert, (record, report) in zip(store.records, in_order(pool, jobs), strict=True):
            progress("quantizing experts", len(reports), len(store.records))
            writer.append(expert, store.records[expert].kind, record)
            reports.append(report)
        index_sha256 = writer.close()
    progress("quantizing experts", len(reports), len(reports))
    return index_sha256, reports


def in_order(pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """The results of jobs that run on the pool, in their order; no more are in memory than its threads, and one."""
    waiting: deque[Future[Result]] = deque()
    for job in jobs:
        waiting.append(pool.submit(job))
        if len(waiting) > pool._max_workers:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
