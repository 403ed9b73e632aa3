"""The entry of `eval`: a bundle by some texts, perhaps against a reference, and what its gates say to that."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pocketmoe.bundle.packed import PackedPlace
from pocketmoe.bundle.partial import partial_directory
from pocketmoe.bundle.reader import Bundle, Progress, no_progress
from pocketmoe.errors import BadInput
from pocketmoe.profiles.quality.gate import Extent, Rule, Verdict, judge, read_gate
from pocketmoe.profiles.quality.levels import compare_levels
from pocketmoe.profiles.quality.models import ReferenceModel
from pocketmoe.profiles.quality.pairs import read_pairs
from pocketmoe.profiles.quality.quality import Slice, evaluate, read_slices
from pocketmoe.profiles.quality.report import LevelComparison, QualityReport
from pocketmoe.profiles.quality.tasks import Figures
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.run import default_threads

_NO_NAMES: Mapping[str, Collection[str]] = {}
_NO_FIGURES: Figures = {}


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """What to evaluate by. `text`: a file, or a directory of *.txt; None for tasks alone. `gate`: a file of limits.

    `free_prompts`, out of the slices in turn, both bundles answer. `out_of_distribution` names slices of a kind that
    calibration did not see. `journal`: a file of what is found, for a killed evaluation to go on from. `max_tokens`: of
    each text, its first ones. `threads` None: one per physical core.
    """

    text: Path | None
    reference: Path | None = None
    gate: Path | None = None
    free_prompts: int = 16
    out_of_distribution: Sequence[str] = ()
    journal: Path | None = None
    memory: MemoryRequest | None = None
    max_tokens: int | None = None
    drop_cold: float = 0.0
    prefer_cached: float = 0.0
    threads: int | None = None
    pairs: Path | None = None  # a file of pairs of sentences (`pairs`)
    packed: PackedPlace | None = None  # for packed experts that cannot, or are not to, lie in the bundle


def refuse_budget(request: EvalRequest) -> None:
    """Raises BadInput: transformers takes what it takes, beside any budget of ours."""
    if request.memory is not None:
        raise BadInput("--memory cannot be kept beside a checkpoint, all of which transformers loads", "Leave it out.")


def read_rules(request: EvalRequest, tasks: Mapping[str, Collection[str]] = _NO_NAMES) -> list[Rule]:
    """The limits of the gate file, held against what will be measured. `tasks`: the names of their figures, by task.

    Raises BadInput, also for texts and pairs that cannot be read.
    """
    slices = read_slices(request.text, request.out_of_distribution) if request.text else []
    pairs = read_pairs(request.pairs) if request.pairs else None
    extent = Extent(
        slices=[piece.name for piece in slices],
        marked=len({piece.out_of_distribution for piece in slices}) == 2,
        compared=request.reference is not None,
        prompts=request.free_prompts,
        kinds=pairs.kinds if pairs else (),
        tasks=tasks,
    )
    return read_gate(request.gate, extent) if request.gate else []


def evaluate_bundle(
    bundle: Path,
    request: EvalRequest,
    progress: Progress = no_progress,
    outside: ReferenceModel | None = None,
    tasks: Figures = _NO_FIGURES,
) -> tuple[QualityReport, list[Verdict]]:
    """The figures, and the verdict of each gate. `outside`: the reference, where that is a checkpoint.

    Raises BadInput, DamagedFile, BudgetTooSmall, OutputError.
    """
    assert request.text, "there is a text to evaluate by"
    rules = read_rules(request, tasks)
    slices = read_slices(request.text, request.out_of_distribution)
    pairs = read_pairs(request.pairs) if request.pairs else None
    options = engine_options(request)
    opened = Bundle.open(bundle, request.packed)
    report = evaluate(
        opened,
        slices,
        reference=outside or (Bundle.open(request.reference, request.packed) if request.reference else None),
        options=options,
        max_tokens=request.max_tokens,
        free_prompts=request.free_prompts,
        journal=request.journal,
        pairs=pairs,
        progress=progress,
    )
    if request.reference and request.free_prompts:
        report = replace(report, levels=_compare_levels(opened, slices, options, progress))
    return report, judge(report, rules, tasks)


def engine_options(request: EvalRequest) -> EngineOptions:
    """How the bundle is run."""
    return EngineOptions(
        memory=request.memory or MemoryRequest(),
        threads=request.threads or default_threads(),
        drop_cold=request.drop_cold,
        prefer_cached=request.prefer_cached,
        capped=True,
    )


def _compare_levels(
    bundle: Bundle, slices: Sequence[Slice], options: EngineOptions, progress: Progress
) -> LevelComparison | None:
    """Beside the bundle, so that its experts need not be copied; nothing where that place cannot be written."""
    beside = bundle.root.resolve()
    if not os.access(beside.parent, os.W_OK):
        return None
    with partial_directory(beside.with_name(f"{beside.name}-levels")) as scratch:
        return compare_levels(bundle, slices, scratch=scratch, options=options, progress=progress)
