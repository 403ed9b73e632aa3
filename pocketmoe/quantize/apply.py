"""Quantizes a bundle into another of the same format.

Experts stream through, a few records at a time, quantized on every core; their order in the file, and so its bytes,
do not depend on how many cores there are.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from threadpoolctl import threadpool_limits

from pocketmoe.bundle.inspection import CARD, write_storage
from pocketmoe.bundle.manifest import DENSE, STORE, Manifest, Provenance, expert_graph
from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import ExpertId, translate_write_errors
from pocketmoe.bundle.stream import Buffer, ExpertSource, WorkerPool, Written, in_order, worker_pool, write_experts
from pocketmoe.bundle.writer import BundleWriter, put
from pocketmoe.calibration import Calibration
from pocketmoe.coded import CodedSource
from pocketmoe.errors import BadInput
from pocketmoe.quantize import dense, experts
from pocketmoe.quantize.algorithms.choice import find_algorithm
from pocketmoe.quantize.algorithms.formats import BlockFormat, Format
from pocketmoe.quantize.calibrated import reaching_sample, write_calibration
from pocketmoe.quantize.checks import check_share
from pocketmoe.quantize.float_expert import FloatExpert
from pocketmoe.quantize.graphs.caches import CacheCalibration, quantize_caches
from pocketmoe.quantize.kept import ACCURACY_LEVELS, Kept
from pocketmoe.quantize.plan import PLAN, QuantizationPlan
from pocketmoe.quantize.schemes import FLOAT32, KEEP, Scheme, find_scheme
from pocketmoe.quantize.workers import Workers, check_workers, open_crew, threads_of, versions


def quantize_bundle(
    source: Path,
    target: Path,
    *,
    scheme: str | Scheme,
    caches: CacheCalibration | None = None,
    calibration: Calibration | None = None,
    plan: QuantizationPlan | None = None,
    made: Bundle | None = None,
    progress: Progress = no_progress,
    workers: Workers = None,
) -> Bundle:
    """Write `source`, a bundle of float32 weights, quantized to `target`; return the new bundle.

    `scheme`: a name (`schemes`), a scheme of your own, or `keep`, which leaves the weights as they are, be they
    quantized already. `calibration`: what the algorithm may go by, and what the bundle then keeps a summary of;
    `plan`: what the scheme came from, to be kept too.
    `made`: what an earlier call made of the same source, calibration and algorithm by another scheme; experts that have
    the same formats in both are copied from there.
    `caches`: what key and value caches in int8 are made by; without it they stay float32.
    `workers`: threads, by default one per core, or a Ray cluster (`workers`); the result does not depend on them.
    In memory are a few experts per worker, and the largest dense tensors. What a killed call left is gone on with.
    Raises BadInput for an unknown scheme, a source that is quantized already or is the target itself, NaN or infinite
    weights or ranges; DamagedFile; OutputError; GateFailed when an expert or matrix comes out too far from what it was.
    Whatever it raises, the target is as it was before.
    """
    quantizer = None if scheme == KEEP else Quantizer.of(scheme, workers, calibration, plan, made)
    bundle = Bundle.open(source)
    if quantizer:
        refuse_quantized(bundle)
    elif not caches:
        raise BadInput(f"scheme {KEEP!r} leaves the weights as they are", "Choose int8 or int4, or add --kv int8.")
    if Path(target).resolve() == bundle.root.resolve():
        raise BadInput(f"{target} is the bundle to be quantized", "Name another output directory.")
    bundle.check_all_but_store()
    same = f"{quantizer.describe()}\n{bundle.manifest.sha256}" if quantizer else None
    with BundleWriter(target, same, progress) as writer, bundle.open_store() as store:
        kind_of = {expert: record.kind for expert, record in store.records.items()}
        if quantizer:
            manifest = quantizer.write(bundle, ExpertSource(kind_of, store.read), writer, progress)
        else:
            manifest = _copy(bundle, writer)
        if caches:
            manifest = quantize_caches(writer.root, manifest, caches)
            with translate_write_errors(writer.target):
                write_storage(writer.root / CARD, manifest)
        return writer.publish(manifest, progress)


def refuse_quantized(bundle: Bundle) -> None:
    """Raises BadInput for a bundle that is not float32."""
    schemes = {kind.scheme for kind in bundle.manifest.expert_kinds} | {t.scheme for t in bundle.manifest.dense}
    if schemes != {"fp32"}:
        found = ", ".join(sorted(schemes - {"fp32"}))
        raise BadInput(
            f"{bundle.root} is quantized already ({found})",
            "Quantize the bundle that was exported, in float32 (export --scheme float32).",
        )


@dataclass(frozen=True)
class Quantizer:
    """Writes what a float32 bundle and its experts become under a scheme."""

    scheme: Scheme
    workers: Workers = None
    calibration: Calibration | None = None
    plan: QuantizationPlan | None = None
    made: Bundle | None = None
    kept: Kept | None = None  # codes to keep: they decide in the scheme's place

    @classmethod
    def of(
        cls,
        scheme: str | Scheme,
        workers: Workers = None,
        calibration: Calibration | None = None,
        plan: QuantizationPlan | None = None,
        made: Bundle | None = None,
    ) -> Quantizer:
        """Raises BadInput for a scheme that is not implemented, and for workers that there cannot be."""
        check_workers(workers)
        return cls(find_scheme(scheme) if isinstance(scheme, str) else scheme, workers, calibration, plan, made)

    def describe(self) -> str:
        """One line with all that the quantized bytes depend on, but for the source."""
        calibrated = f" calibrated by {self.calibration.source}" if self.calibration else ""
        return f"quantize {self.scheme.describe()}{calibrated} {_tools()}"

    def write(self, bundle: Bundle, source: ExpertSource, writer: BundleWriter, progress: Progress) -> Manifest:
        """Write every file but the manifest; return the manifest.

        `bundle`: float32; its store need not be there, its experts come from `source`. Raises as `quantize_bundle`.
        """
        with threadpool_limits(1), translate_write_errors(writer.target):
            plan = dense.DensePlan(bundle, self.scheme, self.calibration, self.kept)
            kinds = _kinds(bundle, source, self.scheme, self.kept)
            _copy_the_rest(bundle, writer.root)
            _write_graphs(bundle.manifest, plan, kinds.quantizers, writer.root)
            if bundle.manifest.dense:
                with worker_pool(threads_of(self.workers)) as pool:
                    _write_dense(bundle.path(DENSE), writer.root / DENSE, plan, pool, progress)
            written = self._write_experts(source, kinds, writer, progress)
            notes = [*plan.notes, *(self.kept.notes if self.kept else ())]
            if self.calibration:
                notes += write_calibration(self.calibration, bundle.manifest, writer.root)
            if self.plan:
                (writer.root / PLAN).write_bytes(msgspec.json.format(msgspec.json.encode(self.plan), indent=1))
            manifest = self._manifest(bundle.manifest, plan, kinds, written, notes)
            write_storage(writer.root / CARD, manifest)
        return manifest

    def _write_experts(self, source: ExpertSource, kinds: _Kinds, writer: BundleWriter, progress: Progress) -> Written:
        with contextlib.ExitStack() as stack:
            crew = stack.enter_context(open_crew(self.workers))
            pool = stack.enter_context(worker_pool(crew.size))
            store = stack.enter_context(self.made.open_store()) if self.made else None
            converters = [crew.converter(quantizer) for quantizer in kinds.quantizers]

            def make(expert: ExpertId) -> tuple[Buffer, float]:
                sample = reaching_sample(self.calibration, expert)
                number, record = kinds.kind_of[expert], source.read(expert)
                if store and self._is_made(store.records[expert].kind, kinds.quantizers[number]):
                    copy = store.read(expert)
                    return copy, kinds.quantizers[number].check(memoryview(record), copy, _name(expert), sample)
                if self.kept:
                    matrices = self.kept.expert_matrices(expert, kinds.quantizers[number].places)
                    quantized, report = kinds.quantizers[number].convert(
                        memoryview(record), _name(expert), None, matrices
                    )
                else:
                    quantized, report = converters[number](record, _name(expert), sample)
                return quantized, report.output_error

            written = write_experts(kinds.kind_of, make, writer.root, pool, progress, "quantizing experts")
        writer.hashes[STORE] = written.file_sha256
        return written

    def _is_made(self, kind: int, quantizer: experts.KindQuantizer) -> bool:
        """Whether `made` has experts of that kind in the very form that the quantizer gives them."""
        assert self.made
        there = self.made.manifest.expert_kinds[kind]
        return msgspec.structs.replace(there, graph=quantizer.kind.graph) == quantizer.kind

    def _manifest(
        self, old: Manifest, plan: dense.DensePlan, kinds: _Kinds, written: Written, notes: Sequence[str]
    ) -> Manifest:
        worst = int(np.argmax(written.errors))
        step = "keep the codes of the source; " if self.kept else f"quantize {self.scheme.describe()}; "
        if self.calibration:
            step += f"calibrated by {self.calibration.source}; "
        step += f"worst expert: {_name(list(kinds.kind_of)[worst])}, output off by {written.errors[worst]:.4f}"
        return msgspec.structs.replace(
            old,
            expert_kinds=tuple(quantizer.kind for quantizer in kinds.quantizers),
            dense=plan.tensors(),
            store_index_sha256=written.index_sha256,
            notes=(*old.notes, *notes),
            provenance=msgspec.structs.replace(_with_tools(old.provenance), steps=(*old.provenance.steps, step)),
        )


@dataclass(frozen=True)
class Keeper:
    """Writes what a float32 draft and its experts become where the codes of their source are kept."""

    def describe(self) -> str:
        return f"keep the codes of the source {_tools()}"

    def write(
        self, bundle: Bundle, source: ExpertSource, coded: CodedSource, writer: BundleWriter, progress: Progress
    ) -> Manifest:
        """As `Quantizer.write`; what has no codes, or none that a format holds, stays as it is."""
        scheme = Scheme(KEEP, BlockFormat(4, 32), {}, ACCURACY_LEVELS)
        return Quantizer(scheme, kept=Kept(coded)).write(bundle, source, writer, progress)


def for_export(scheme: str | None, workers: Workers = None) -> tuple[Quantizer | None, Keeper | None]:
    """What follows an export by a scheme's name: one that rounds, one that keeps codes, or neither (float32).

    Without a name codes are kept where there are any.
    """
    if scheme is None or scheme in (KEEP, FLOAT32):
        return None, None if scheme == FLOAT32 else Keeper()
    return Quantizer.of(scheme, workers), None


@dataclass(frozen=True)
class _Kinds:
    """The kinds of expert that a scheme makes of a bundle's, and which of them each expert becomes."""

    quantizers: Sequence[experts.KindQuantizer]
    kind_of: Mapping[ExpertId, int]


def _kinds(bundle: Bundle, source: ExpertSource, scheme: Scheme, kept: Kept | None) -> _Kinds:
    """A kind for each source kind and combination of formats that some expert has, in the order of the source."""
    old = bundle.manifest.expert_kinds
    matrices = [experts.matrices_of(kind) for kind in old]
    floats = [FloatExpert(bundle.check_file(kind.graph), kind) for kind in old] if kept else []

    def forms_of(expert: ExpertId, kind: int) -> tuple[Format | None, ...]:
        if kept:
            return kept.expert_forms(expert, matrices[kind], floats[kind])
        return scheme.forms_of(expert, len(matrices[kind]))

    wanted = {expert: (kind, forms_of(expert, kind)) for expert, kind in source.kind_of.items()}
    numbers = {key: number for number, key in enumerate(sorted(set(wanted.values()), key=str))}
    algorithm = find_algorithm(scheme.algorithm)
    quantizers = [
        experts.KindQuantizer(
            bundle, old[kind], experts.KindFormat(expert_graph(number), forms, scheme.accuracy_level, algorithm)
        )
        for (kind, forms), number in numbers.items()
    ]
    return _Kinds(quantizers, {expert: numbers[key] for expert, key in wanted.items()})


def _write_graphs(
    old: Manifest, plan: dense.DensePlan, quantizers: Sequence[experts.KindQuantizer], root: Path
) -> None:
    """Raises GateFailed when they, as written, do not hold what was planned."""
    plan.write_graphs(root)
    check_share([root / name for name in dense.graph_names(old)], plan.planned_bytes)
    for quantizer in quantizers:
        path = root / quantizer.kind.graph
        path.write_bytes(quantizer.graph)
        check_share([path], quantizer.planned_bytes)


def write_variant(bundle: Bundle, target: Path, scheme: Scheme, calibration: Calibration | None = None) -> Bundle:
    """`bundle` with its dense tensors by a scheme, and experts as they are, which are linked to, not copied.

    For measuring what a format costs. Raises as `quantize_bundle`.
    """
    old = bundle.manifest
    with BundleWriter(target) as writer, worker_pool() as pool, translate_write_errors(target):
        plan = dense.DensePlan(bundle, scheme, calibration)
        _copy_the_rest(bundle, writer.root)
        _write_graphs(old, plan, [], writer.root)
        for kind in old.expert_kinds:
            shutil.copyfile(bundle.path(kind.graph), writer.root / kind.graph)
        _write_dense(bundle.path(DENSE), writer.root / DENSE, plan, pool, no_progress)
        put(bundle, STORE, writer.root / STORE)
        writer.hashes[STORE] = old.files[STORE].sha256
        return writer.publish(msgspec.structs.replace(old, dense=plan.tensors()))


def _name(expert: ExpertId) -> str:
    return f"layer {expert.layer}, expert {expert.expert}"


def _copy(bundle: Bundle, writer: BundleWriter) -> Manifest:
    """Write every file but the manifest as it is; return the manifest."""
    with translate_write_errors(writer.target):
        for name in bundle.manifest.files:
            (writer.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path(name), writer.root / name)
    return msgspec.structs.replace(bundle.manifest, provenance=_with_tools(bundle.manifest.provenance))


def _with_tools(provenance: Provenance) -> Provenance:
    return msgspec.structs.replace(provenance, tools={**provenance.tools, **_tools()})


def _tools() -> dict[str, str]:
    return {f"{name} (quantize)": version for name, version in versions().items()}


def _copy_the_rest(bundle: Bundle, root: Path) -> None:
    """Tokenizer, model card and whatever else quantizing does not change."""
    changed = {DENSE, STORE, *dense.graph_names(bundle.manifest)}
    changed |= {kind.graph for kind in bundle.manifest.expert_kinds}
    for name in bundle.manifest.files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name not in changed:
            shutil.copyfile(bundle.path(name), root / name)


def _write_dense(source: Path, target: Path, plan: dense.DensePlan, pool: WorkerPool, progress: Progress) -> None:
    with open(target, "wb") as file:
        for done, chunks in enumerate(in_order(pool, plan.jobs(source))):
            progress("quantizing dense weights", done, len(plan.entries))
            for offset, data in chunks:
                file.seek(offset)
                file.write(data)
        file.truncate(plan.nbytes)
    progress("quantizing dense weights", len(plan.entries), len(plan.entries))
