"""What Python users call: `pocketmoe.load`, and the commands' work as functions.

    import pocketmoe

    with pocketmoe.load("SMALL", memory="4GB") as model:
        print(model.generate("Why is the sky blue?").text)

Everything raises the classes of `pocketmoe.errors`; nothing prints. What is heavy is imported when it is used.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.errors import BadInput
from pocketmoe.runtime.conversation import Chat, Generation, Stream
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.model import LoadRequest, Model

if TYPE_CHECKING:
    from pocketmoe.bundle.reader import Bundle
    from pocketmoe.profiles.plan.plan import PlanReport
    from pocketmoe.profiles.quality.gate import Verdict
    from pocketmoe.profiles.quality.report import QualityReport
    from pocketmoe.runtime.backends.choice import BackendName
    from pocketmoe.runtime.paging.prefetch import PrefetchMode

__all__ = ["Chat", "Evaluation", "Generation", "Model", "Stream", "evaluate", "export", "load", "plan"]

PathLike = str | os.PathLike[str]


def load(
    bundle: PathLike,
    *,
    memory: str | int | None = None,
    context: int | None = None,
    threads: int | None = None,
    backend: BackendName = "auto",
    prefetch: PrefetchMode = "auto",
    drop_cold: float = 0.0,
    prefer_cached: float = 0.0,
    progress: Progress = no_progress,
) -> Model:
    """A bundle, ready to answer. Use it in a `with` block, or close it.

    `memory`: for the whole process: "800MB", "1.5GiB", bytes, or "40%": room for 40% of the experts; None: 80% of what
    is free. `context`: the longest text in tokens, prompt and answer together; None: 4096, or the model's own if that
    is less. `progress(what, done, total)` is told what takes long. The other options are those of `pocketmoe run`.
    Raises BadInput, DamagedFile, BudgetTooSmall or OverBudget.
    """
    request = LoadRequest(_memory(memory), context, threads, backend, prefetch, drop_cold, prefer_cached)
    return Model(Path(bundle), request, progress)


def export(
    checkpoint: str,
    output: PathLike,
    *,
    scheme: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    adapter: str | None = None,
    workers: int | str | None = None,
    progress: Progress = no_progress,
) -> Bundle:
    """Turn a checkpoint, a directory or a hub id, into a bundle; the options are those of `pocketmoe export`.

    Needs pocketmoe[export]. Raises BadInput, UnsupportedModel, DamagedFile or OutputError.
    """
    if workers and not scheme:
        raise BadInput("workers are for a scheme", "Without one experts are only copied.")
    from pocketmoe.export.checkpoint.hub import find
    from pocketmoe.quantize.apply import Quantizer

    quantizer = Quantizer.of(scheme, workers) if scheme else None
    source = find(checkpoint, revision=revision, code=trust_remote_code, progress=progress)
    merged = find(adapter, progress=progress) if adapter is not None else None
    from pocketmoe.export.convert import export_checkpoint  # torch takes seconds

    return export_checkpoint(
        source,
        Path(output),
        quantizer=quantizer,
        run_its_code=trust_remote_code,
        adapter=merged,
        progress=progress,
    )


@dataclass(frozen=True)
class Evaluation:
    """How good a bundle is, and which gates hold."""

    report: QualityReport
    verdicts: Sequence[Verdict]

    @property
    def passed(self) -> bool:
        """Whether all gates hold."""
        return all(verdict.passed for verdict in self.verdicts)


def evaluate(
    bundle: PathLike,
    text: PathLike,
    *,
    reference: PathLike | None = None,
    gate: PathLike | None = None,
    free: int = 16,
    ood: Sequence[str] = (),
    resume: PathLike | None = None,
    memory: str | int | None = None,
    max_tokens: int | None = None,
    drop_cold: float = 0.0,
    prefer_cached: float = 0.0,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> Evaluation:
    """Say how well a bundle predicts a text, a file or a directory of *.txt; the options are those of `pocketmoe eval`.

    A gate that does not hold raises nothing here: see `passed`. Raises BadInput, DamagedFile, BudgetTooSmall.
    """
    from pocketmoe.bundle.reader import Bundle
    from pocketmoe.profiles.quality import quality
    from pocketmoe.profiles.quality.gate import Extent, judge, read_gate
    from pocketmoe.runtime.engine.engine import EngineOptions
    from pocketmoe.runtime.run import default_threads

    slices = quality.read_slices(Path(text), tuple(ood))
    marks = {piece.out_of_distribution for piece in slices}
    extent = Extent([piece.name for piece in slices], len(marks) == 2, reference is not None, free)
    rules = read_gate(Path(gate), extent) if gate is not None else []
    options = EngineOptions(
        memory=_memory(memory) or MemoryRequest(),
        threads=threads or default_threads(),
        drop_cold=drop_cold,
        prefer_cached=prefer_cached,
        capped=True,
    )
    report = quality.evaluate(
        Bundle.open(Path(bundle)),
        slices,
        reference=Bundle.open(Path(reference)) if reference is not None else None,
        options=options,
        max_tokens=max_tokens,
        free_prompts=free,
        journal=Path(resume) if resume is not None else None,
        progress=progress,
    )
    return Evaluation(report, judge(report, rules))


def plan(
    model: PathLike,
    *,
    device: str,
    target_tokens_per_s: float | None = None,
    context: int = 2048,
    prompt_tokens: int = 128,
    reserve: int | None = None,
    progress: Progress = no_progress,
) -> PlanReport:
    """Which scheme and budget of a checkpoint or bundle fit a device; the options are those of `pocketmoe plan`.

    `recommended` is None where nothing fits. Raises BadInput or DamagedFile.
    """
    from importlib.util import find_spec

    from pocketmoe.profiles.plan.planning import PlanRequest, make_plan

    request = PlanRequest(Path(model), device, target_tokens_per_s, context, prompt_tokens, reserve)
    counts = find_spec("transformers") and find_spec("torch")
    return make_plan(request, _count if counts else None, progress)


def _count(config_json: Path) -> dict[str, int]:
    from pocketmoe.export.checkpoint.counting import count_parameters

    return count_parameters(config_json)


def _memory(memory: str | int | None) -> MemoryRequest | None:
    """Raises BadInput for what is no size."""
    if isinstance(memory, int):
        memory = f"{memory}B"
    try:
        return None if memory is None else MemoryRequest.parse(memory)
    except ValueError as error:
        raise BadInput(f"{error}", 'Say memory="800MB", "1.5GiB", a number of bytes, or "40%".') from error
