"""The entry of `eval`: a bundle by texts, pairs and tasks, perhaps against a reference; judged by gates, and filed."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import require
from pocketmoe.harness.model import Logits
from pocketmoe.harness.tasks import Tasks, TasksRequest, length_of
from pocketmoe.profiles.filing.page import file_evaluation
from pocketmoe.profiles.filing.record import make_place
from pocketmoe.profiles.quality.evaluation import (
    EvalRequest,
    engine_options,
    evaluate_bundle,
    read_rules,
    refuse_budget,
)
from pocketmoe.profiles.quality.gate import Rule, Verdict, judge_tasks
from pocketmoe.profiles.quality.models import ReferenceModel, is_checkpoint
from pocketmoe.profiles.quality.quality import Slice, tokenize
from pocketmoe.profiles.quality.report import QualityReport
from pocketmoe.profiles.quality.tasks import TaskFigure, estimates, gated
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.run import default_threads

_SAMPLE = Slice("a sample", "There were 12 foxes in Köln: def f(x):\n\treturn x % 7  # naïve, ça va?")


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest:
    """What to evaluate by. `output`: a directory for record, page and model card; None: nothing is filed.

    Raises ValueError where there is neither a text nor a task, or nothing to file.
    """

    by: EvalRequest
    tasks: TasksRequest | None = None
    output: Path | None = None

    def __post_init__(self) -> None:
        if self.by.text is None and (self.output or self.tasks is None):
            raise ValueError("Give --text TEXT" + (", which -o files." if self.tasks else ", or --tasks NAMES."))


@dataclass(frozen=True)
class Evaluation:
    """How good a bundle is, and which gates hold. `report`: None without a text; `tasks`: of lm-evaluation-harness."""

    report: QualityReport | None
    verdicts: Sequence[Verdict]
    tasks: Sequence[TaskFigure] = ()

    @property
    def passed(self) -> bool:
        """Whether all gates hold."""
        return all(verdict.passed for verdict in self.verdicts)


def evaluate(bundle: Path, request: EvaluateRequest, progress: Progress = no_progress) -> Evaluation:
    """Measure, judge and file. A gate that does not hold raises nothing: see `passed`.

    What cannot be measured or filed is refused first. Raises BadInput, DamagedFile, BudgetTooSmall, OutputError.
    """
    by, tasks = request.by, None
    opened = Bundle.open(bundle, by.packed)
    if request.output is not None:
        make_place(request.output)
    if request.tasks:
        tasks = Tasks(request.tasks, progress)
    rules = read_rules(by, gated(tasks.metrics, by.reference is not None) if tasks else {})
    outside = _open_checkpoint(by, progress)
    figures: Sequence[TaskFigure] = _run(opened, tasks, by, outside, progress) if tasks else ()
    found = _judged(bundle, by, rules, outside, figures, progress)
    if request.output is not None and found.report is not None:
        about = outside.about if outside else None
        file_evaluation(bundle, by, found.report, found.verdicts, request.output, about, figures)
    return found


def _judged(
    bundle: Path,
    by: EvalRequest,
    rules: Sequence[Rule],
    outside: ReferenceModel | None,
    figures: Sequence[TaskFigure],
    progress: Progress,
) -> Evaluation:
    if by.text is None:
        return Evaluation(None, judge_tasks(rules, estimates(figures)), figures)
    report, verdicts = evaluate_bundle(bundle, by, progress, outside, estimates(figures))
    return Evaluation(report, verdicts, figures)


def _open_checkpoint(by: EvalRequest, progress: Progress) -> ReferenceModel | None:
    """The reference where that is a checkpoint, which transformers runs. Raises BadInput."""
    if by.reference is None or not is_checkpoint(by.reference):
        return None
    refuse_budget(by)
    for package in ("torch", "transformers"):
        require(package, "eval --reference CHECKPOINT")
    progress("loading the checkpoint", 0, 1)
    from pocketmoe.export.reference import TransformersModel  # torch takes seconds

    return TransformersModel(by.reference, by.threads or default_threads())


def _run(
    bundle: Bundle, tasks: Tasks, by: EvalRequest, outside: ReferenceModel | None, progress: Progress
) -> Sequence[TaskFigure]:
    """Tasks on the bundle and, where there is one, on the reference, one after the other. Raises BadInput."""
    other = Bundle.open(by.reference, by.packed) if by.reference and outside is None else None
    if other or outside:
        tokenize([bundle, other] if other else [bundle], [_SAMPLE], None, outside)  # refuses another vocabulary
    with _engine(bundle, by, progress) as engine:
        own = tasks.run(bundle, engine, progress)
    if outside:
        return own.against(tasks.run(bundle, outside, progress))
    if other is None:
        return own.figures
    with _engine(other, replace(by, drop_cold=0.0, prefer_cached=0.0), progress) as engine:
        return own.against(tasks.run(bundle, engine, progress))


@contextmanager
def _engine(bundle: Bundle, by: EvalRequest, progress: Progress) -> Generator[Logits]:
    with Engine(bundle, replace(engine_options(by), capacity=length_of(bundle)), progress) as engine:
        yield engine
