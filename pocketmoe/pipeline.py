"""What quantize goes by: a text run through a bundle. This is where `profiles`, which measure, and `quantize` meet.

What was found is kept beside the output (`bundle.resume`) until the command ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pocketmoe.bundle.progress import Progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.resume import Work, resumable_work
from pocketmoe.bundle.store import StoreReader
from pocketmoe.bundle.writer import refuse_to_replace
from pocketmoe.calibration import Calibration, calibrate_once
from pocketmoe.profiles.calibration.cache_ranges import measure_cache_ranges
from pocketmoe.profiles.calibration.calibrate import calibrate, hold_out, modest, sha256_of_text
from pocketmoe.profiles.calibration.reference_logits import ReferenceLogits
from pocketmoe.profiles.quality.quality import Slice
from pocketmoe.quantize.float_backend import FloatBackend
from pocketmoe.quantize.graphs.caches import CacheCalibration, find_caches
from pocketmoe.quantize.graphs.outputs import write_with_activations
from pocketmoe.quantize.mixed.choose import first_plan, plan_mixed
from pocketmoe.quantize.plan import Plan, SizeBudget
from pocketmoe.quantize.workers import versions
from pocketmoe.runtime.backends.protocol import Backend
from pocketmoe.runtime.backends.sessions import SessionBackend
from pocketmoe.runtime.engine.engine import EngineOptions

_DENSE_TOKENS = 1024  # of each text that calibration left out, for what dense tensors cost


@dataclass(frozen=True)
class Measuring:
    """`held`: text to judge by what came of `slices`. `work`: beside the output."""

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

    def plan(self, calibration: Calibration, size: SizeBudget | None, fetched: int | None, rounding: str) -> Plan:
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
            rounding=rounding,
            measure=lambda variant: reference().mean_kl(variant),
            work=self.work,
        )

    def made(self) -> Bundle | None:
        """What planning has quantized already."""
        path = first_plan(self.work)
        return Bundle.open(path) if path.is_dir() else None


@contextlib.contextmanager
def measuring(
    bundle: Bundle, slices: Sequence[Slice], tokens: int, output: Path, options: str, mixed: bool, progress: Progress
) -> Iterator[Measuring]:
    """What there is to measure by, until the context is left; a killed command's successor finds what it had found.

    `options`: all that measuring depends on beside the arguments. Raises OutputError, also for an output that must not
    be replaced: now, not hours later.
    """
    refuse_to_replace(output.absolute())
    beside = output.absolute().with_name(f"{output.name}-measuring")
    tools = " ".join(f"{name} {version}" for name, version in versions().items())
    plan = f"measure {tokens} tokens of {sha256_of_text(slices)}\n{options}\n{bundle.manifest.sha256}\n{tools}"
    kept, held = hold_out(slices) if mixed else (slices, slices)
    with resumable_work(beside, plan, progress) as work:
        yield Measuring(bundle, kept, held, tokens, work)


def _options(bundle: Bundle) -> EngineOptions:
    return modest(bundle, _backend)


def _backend(bundle: Bundle, store: StoreReader) -> Backend:
    """Neither packs anything beside a bundle that is run only this once."""
    is_float = {kind.scheme for kind in bundle.manifest.expert_kinds} == {"fp32"}
    return FloatBackend(bundle, store) if is_float else SessionBackend(bundle, store)
