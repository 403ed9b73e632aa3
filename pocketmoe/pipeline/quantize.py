"""The entry of `quantize`: calibrate, choose formats, quantize. Here `profiles`, which measure, and `quantize` meet.

What a text showed is kept beside the output (`bundle.resume`) until the call ends; a killed one is gone on with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Literal

from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.resume import Work, resumable_work
from pocketmoe.bundle.store import StoreReader
from pocketmoe.bundle.writer import refuse_to_replace
from pocketmoe.calibration import Calibration, calibrate_once
from pocketmoe.profiles.calibration.cache_ranges import measure_cache_ranges
from pocketmoe.profiles.calibration.calibrate import calibrate, hold_out, modest, sha256_of_text
from pocketmoe.profiles.calibration.reference_logits import ReferenceLogits
from pocketmoe.profiles.quality.quality import Slice, read_slices
from pocketmoe.quantize.algorithms.choice import find_algorithm
from pocketmoe.quantize.algorithms.formats import Format
from pocketmoe.quantize.apply import quantize_bundle, refuse_quantized
from pocketmoe.quantize.float_backend import FloatBackend
from pocketmoe.quantize.graphs.caches import CacheCalibration, find_caches
from pocketmoe.quantize.graphs.outputs import write_with_activations
from pocketmoe.quantize.mixed.choose import first_plan, plan_mixed, refuse_too_small, scheme_of
from pocketmoe.quantize.plan import QuantizationPlan, SizeBudget
from pocketmoe.quantize.schemes import KEEP, Scheme, find_scheme, override
from pocketmoe.quantize.workers import Workers, check_workers, versions
from pocketmoe.runtime.backends.graph_checks import check_graphs
from pocketmoe.runtime.backends.protocol import Backend
from pocketmoe.runtime.backends.sessions import SessionBackend
from pocketmoe.runtime.engine.options import EngineOptions

MIXED, GPTQ, SEARCH = "mixed", "gptq", "search"
_DENSE_TOKENS = 1024  # of each text that calibration left out, for what dense tensors cost


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest:
    """How to quantize. `scheme`: a name of `schemes`, `mixed` within a budget, or `keep` for caches alone.

    `formats`: other formats by class of weights (experts, attention, shared_expert, head, embedding, other).
    `fetch_budget`: bytes of experts that a token may touch. `rounding` None: gptq with a calibration, else search.
    `calibration`: a text, or a directory of *.txt, of which `calibration_tokens` are gone by.
    Raises ValueError for what does not go together.
    """

    scheme: str = "int4"
    formats: Mapping[str, Format] = field(default_factory=dict[str, Format])
    size_budget: SizeBudget | None = None
    fetch_budget: int | None = None
    rounding: str | None = None
    kv: Literal["float32", "int8"] = "float32"
    calibration: Path | None = None
    calibration_tokens: int = 16384
    workers: Workers = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scheme", self.scheme.lower())
        object.__setattr__(self, "rounding", self.rounding.lower() if self.rounding else None)
        if not self.calibration and (self.kv == "int8" or self.scheme == MIXED or self.rounding == GPTQ):
            raise ValueError(
                "--kv int8, --scheme mixed and --rounding gptq need --calibration TEXT: they go by what a text shows."
            )
        if self.formats and self.scheme in (MIXED, KEEP):
            raise ValueError(f"--format does not go with --scheme {self.scheme}.")
        has_budget = self.size_budget is not None or self.fetch_budget is not None
        if has_budget != (self.scheme == MIXED):
            raise ValueError("--scheme mixed needs --size-budget or --fetch-budget, which are for it alone.")

    @property
    def algorithm(self) -> str:
        return self.rounding or (GPTQ if self.calibration else SEARCH)

    def find_scheme(self) -> str | Scheme:
        """The scheme, or its name where that says all: `keep`, and `mixed`, which is found by measuring.

        Raises BadInput for an unknown scheme, algorithm or class of weights.
        """
        if self.scheme == MIXED:
            return self.scheme
        find_algorithm(self.algorithm)
        if self.scheme == KEEP:
            return self.scheme
        return replace(override(find_scheme(self.scheme), self.formats), algorithm=self.algorithm)

    def describe(self) -> str:
        """All that measuring depends on beside the text, the bundle and the tools."""
        return f"{self.scheme} {self.algorithm} {self.size_budget} {self.fetch_budget}"


@dataclass(frozen=True)
class Quantized:
    """The new bundle and, where formats were chosen by measuring, how."""

    bundle: Bundle
    plan: QuantizationPlan | None


@dataclass(frozen=True)
class _Decided:
    """A scheme and what else `quantize_bundle` takes."""

    scheme: str | Scheme
    caches: CacheCalibration | None = None
    calibration: Calibration | None = None
    plan: QuantizationPlan | None = None
    made: Bundle | None = None


def quantize(bundle: Path, output: Path, request: QuantizeRequest, progress: Progress = no_progress) -> Quantized:
    """Write the bundle at `bundle` with smaller weights, and caches if wanted, to `output`.

    What a killed call left is gone on with. Raises BadInput, DamagedFile, OutputError, SizeTooSmall for a budget that
    nothing meets, GateFailed for weights that come out too far from what they were. Whatever it raises, `output` is as
    it was before.
    """
    check_workers(request.workers)
    source = Bundle.open(bundle)
    check_graphs(source)  # before the onnx package reads them
    if request.scheme != KEEP:
        refuse_quantized(source)
    refuse_to_replace(output.absolute())
    if request.scheme == MIXED and request.size_budget is not None:
        refuse_too_small(source, request.size_budget)
    decided = _Decided(request.find_scheme())
    with contextlib.ExitStack() as stack:
        if request.calibration:
            slices = read_slices(request.calibration)
            text = stack.enter_context(measuring(source, slices, output, request, progress))
            decided = _decide(request, decided.scheme, text)
        written = quantize_bundle(
            bundle,
            output,
            scheme=decided.scheme,
            caches=decided.caches,
            calibration=decided.calibration,
            plan=decided.plan,
            made=decided.made,
            progress=progress,
            workers=request.workers,
        )
    return Quantized(written, decided.plan)


def _decide(request: QuantizeRequest, scheme: str | Scheme, text: Measuring) -> _Decided:
    """Go by what the text shows."""
    caches = text.calibrate_caches() if request.kv == "int8" else None
    if request.scheme == KEEP:
        return _Decided(scheme, caches)
    calibration = text.calibrate()
    if request.scheme != MIXED:
        return _Decided(scheme, caches, calibration)
    plan = text.plan(calibration, request.size_budget, request.fetch_budget, request.algorithm)
    return _Decided(scheme_of(plan, request.algorithm), caches, calibration, plan, text.made())


@dataclass(frozen=True)
class Measuring:
    """`slices`: text to calibrate by; `held`: other text, to judge the result on; `work`: keeps what is found."""

    bundle: Bundle
    slices: Sequence[Slice]
    held: Sequence[Slice]
    tokens: int
    work: Work

    def calibrate(self) -> Calibration:
        def make() -> Calibration:
            copy = write_with_activations(self.bundle, self.work.scratch / "with-activations")
            return calibrate(
                copy.bundle,
                self.slices,
                scratch=self.work.scratch,
                activation_outputs=copy.outputs,
                tokens=self.tokens,
                options=_options(copy.bundle),
                progress=self.work.progress,
            )

        return calibrate_once(self.work, make)

    def calibrate_caches(self) -> CacheCalibration:
        found = measure_cache_ranges(
            self.bundle,
            find_caches(self.bundle),
            self.slices,
            options=_options(self.bundle),
            progress=self.work.progress,
        )
        return CacheCalibration(found.ranges, found.source)

    def plan(
        self, calibration: Calibration, size: SizeBudget | None, fetched: int | None, algorithm: str
    ) -> QuantizationPlan:
        @cache
        def reference() -> ReferenceLogits:
            options = _options(self.bundle)
            return ReferenceLogits(
                self.bundle,
                self.held,
                options,
                scratch=self.work.scratch,
                tokens=_DENSE_TOKENS,
                progress=self.work.progress,
            )

        return plan_mixed(
            self.bundle,
            calibration,
            size,
            fetched,
            algorithm=algorithm,
            measure=lambda variant: reference().mean_kl(variant),
            work=self.work,
        )

    def made(self) -> Bundle | None:
        """The bundle that planning has quantized, whose experts can be copied."""
        path = first_plan(self.work)
        return Bundle.open(path) if path.is_dir() else None


@contextlib.contextmanager
def measuring(
    bundle: Bundle, slices: Sequence[Slice], output: Path, request: QuantizeRequest, progress: Progress
) -> Generator[Measuring]:
    """What there is to measure by, until the context is left; a killed command's successor finds what it had found.

    Raises OutputError, also for an output that must not be replaced: now, not hours later.
    """
    refuse_to_replace(output.absolute())
    beside = output.absolute().with_name(f"{output.name}-measuring")
    tools = " ".join(f"{name} {version}" for name, version in versions().items())
    tokens, text = request.calibration_tokens, sha256_of_text(slices)
    plan = f"measure {tokens} tokens of {text}\n{request.describe()}\n{bundle.manifest.sha256}\n{tools}"
    kept, held = hold_out(slices) if request.scheme == MIXED else (slices, slices)
    with resumable_work(beside, plan, request.workers, progress) as work:
        yield Measuring(bundle, kept, held, tokens, work)


def _options(bundle: Bundle) -> EngineOptions:
    return modest(bundle, _backend)


def _backend(bundle: Bundle, store: StoreReader) -> Backend:
    """The backend for a bundle that is run only this once: neither of these packs experts beside it."""
    is_float = {kind.scheme for kind in bundle.manifest.expert_kinds} == {"fp32"}
    return FloatBackend(bundle, store) if is_float else SessionBackend(bundle, store)
