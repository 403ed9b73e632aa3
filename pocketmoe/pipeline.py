"""What quantize goes by: a text run through a bundle. This is where `profiles`, which measure, and `quantize` meet.

What was found is kept beside the output (`steps`) until the command ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pocketmoe.bundle.partial import partial_directory
from pocketmoe.bundle.reader import Bundle, Progress, refuse_to_replace
from pocketmoe.bundle.resume import Steps
from pocketmoe.bundle.store import StoreReader, translate_write_errors
from pocketmoe.calibration import Calibration, calibrate_once
from pocketmoe.profiles.calibration.cache_ranges import measure_cache_ranges
from pocketmoe.profiles.calibration.calibrate import calibrate, hold_out, modest, sha256_of_text
from pocketmoe.profiles.calibration.reference_logits import Yardstick
from pocketmoe.profiles.quality.quality import Slice
from pocketmoe.quantize.float_backend import FloatBackend
from pocketmoe.quantize.graphs.caches import CacheCalibration, find_caches
from pocketmoe.quantize.graphs.outputs import write_tapped
from pocketmoe.quantize.mixed.choose import first_plan, plan_mixed
from pocketmoe.quantize.plan import Plan, SizeBudget
from pocketmoe.quantize.workers import versions
from pocketmoe.runtime.backends.protocol import Backend
from pocketmoe.runtime.backends.sessions import SessionBackend
from pocketmoe.runtime.engine.engine import EngineOptions

_DENSE_TOKENS = 1024  # of each text that calibration left out, for what dense tensors cost


@dataclass(frozen=True)
class Measuring:
    """`held`: text to judge by what came of `slices`. `scratch`: a directory beside the output."""

    bundle: Bundle
    slices: Sequence[Slice]
    held: Sequence[Slice]
    tokens: int
    scratch: Path
    steps: Steps
    progress: Progress

    def calibrate(self) -> Calibration:
        def make() -> Calibration:
            tapped = write_tapped(self.bundle, self.scratch / "tapped")
            return calibrate(
                tapped.bundle,
                self.slices,
                scratch=self.scratch,
                taps=tapped.outputs,
                tokens=self.tokens,
                options=_options(tapped.bundle),
                progress=self.progress,
            )

        return calibrate_once(self.steps, make)

    def calibrate_caches(self) -> CacheCalibration:
        found = measure_cache_ranges(
            self.bundle,
            find_caches(self.bundle),
            self.slices,
            options=_options(self.bundle),
            progress=self.progress,
        )
        return CacheCalibration(found.ranges, found.source)

    def plan(self, calibration: Calibration, size: SizeBudget | None, fetched: int | None, rounding: str) -> Plan:
        @cache
        def yardstick() -> Yardstick:
            options = _options(self.bundle)
            return Yardstick(
                self.bundle, self.held, options, scratch=self.scratch, tokens=_DENSE_TOKENS, progress=self.progress
            )

        return plan_mixed(
            self.bundle,
            calibration,
            size,
            fetched,
            rounding=rounding,
            measure=lambda variant: yardstick().mean_kl(variant),
            scratch=self.scratch,
            steps=self.steps,
            progress=self.progress,
        )

    def made(self) -> Bundle | None:
        """What planning has quantized already."""
        path = first_plan(self.steps, self.scratch)
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
    with contextlib.ExitStack() as stack:
        with translate_write_errors(beside):
            scratch = stack.enter_context(partial_directory(beside, plan, progress))
        kept, held = hold_out(slices) if mixed else (slices, slices)
        yield Measuring(bundle, kept, held, tokens, scratch, Steps(scratch), progress)


def _options(bundle: Bundle) -> EngineOptions:
    return modest(bundle, _backend)


def _backend(bundle: Bundle, store: StoreReader) -> Backend:
    """Neither packs anything beside a bundle that is run only this once."""
    is_float = {kind.scheme for kind in bundle.manifest.expert_kinds} == {"fp32"}
    return FloatBackend(bundle, store) if is_float else SessionBackend(bundle, store)
