"""Tasks of lm-evaluation-harness: found, run on a model, and the figures that they come to."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import math
import statistics
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import BadInput, first_line, install
from pocketmoe.harness.model import Logits, Scorer, make_model
from pocketmoe.profiles.quality.tasks import TaskFigure

MOST_TOKENS = 4096  # that are read at once, less where the model's context is shorter
_FAULTS = (KeyError, ValueError, TypeError, OSError, RuntimeError, ImportError, AssertionError, AttributeError)


@dataclass(frozen=True, kw_only=True)
class TasksRequest:
    """Which tasks. `folder`: of the user's own task files; the harness' tasks are left out then.

    `limit`: of each task, its first examples.
    """

    tasks: Sequence[str]
    folder: Path | None = None
    limit: int | None = None


def length_of(bundle: Bundle) -> int:
    """How many tokens a task's example may have."""
    return min(MOST_TOKENS, bundle.manifest.model.context_length)


class Tasks:
    """Tasks that were found and loaded, with their data."""

    def __init__(self, request: TasksRequest, progress: Progress = no_progress) -> None:
        """Raises BadInput for tasks that are not known or cannot be loaded, and where the harness is not installed."""
        self._request = request
        progress("loading tasks", 0, 1)
        try:
            with _quiet():
                self._harness: Any = importlib.import_module("lm_eval")
                tools: Any = importlib.import_module("lm_eval.tasks")
                folder = str(request.folder) if request.folder else None
                self._manager: Any = tools.TaskManager(include_path=folder, include_defaults=folder is None)
        except ImportError as error:
            raise BadInput(f"eval --tasks needs lm-evaluation-harness ({error})", install("lm-eval")) from error
        except _FAULTS as error:
            raise _unusable(error) from error
        unknown = [task for task in request.tasks if task not in self._manager.all_tasks]
        if unknown or not request.tasks:
            known = ", ".join(sorted(self._manager.all_tasks)[:20])
            raise BadInput(f"no task is named {', '.join(unknown) or '(nothing)'}", f"There are: {known or 'none'}.")
        try:
            with _quiet():
                loaded: Any = tools.get_task_dict([*request.tasks], self._manager)
        except _FAULTS as error:
            raise _unusable(error) from error
        self.metrics: Mapping[str, Sequence[str]] = {name: _metrics(task) for name, task in _leaves(loaded)}
        """The metrics that each task will have figures of."""

    def run(self, bundle: Bundle, model: Logits, progress: Progress = no_progress) -> Results:
        """Run them all on a model with a bundle's tokenizer. Raises BadInput where one cannot be run."""
        scorer = Scorer(model, bundle, length_of(bundle))
        answering = make_model(scorer, lambda n, of: progress("running tasks", n, of))
        try:
            with _quiet():
                found: Any = self._harness.simple_evaluate(
                    model=answering,
                    tasks=[*self._request.tasks],
                    task_manager=self._manager,
                    limit=self._request.limit,
                    bootstrap_iters=1000,
                    log_samples=True,
                )
        except _FAULTS as error:
            raise _unusable(error) from error
        return Results(list(_figures(found)), _by_example(found))


@dataclass(frozen=True)
class Results:
    """Figures; and what each example came to, by task, metric and example, where a metric has a figure for each."""

    figures: Sequence[TaskFigure]
    examples: Mapping[tuple[str, str], Mapping[Any, float]]

    def against(self, reference: Results) -> list[TaskFigure]:
        """The figures beside those of another model on the same examples."""
        theirs = {(found.task, found.metric): found.value for found in reference.figures}
        return [
            replace(found, reference=theirs.get(key), change_stderr=self._change_stderr(reference, key))
            for found in self.figures
            for key in [(found.task, found.metric)]
        ]

    def _change_stderr(self, reference: Results, key: tuple[str, str]) -> float | None:
        ours, theirs = self.examples.get(key, {}), reference.examples.get(key, {})
        changes = [value - theirs[example] for example, value in ours.items() if example in theirs]
        return statistics.stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else None


def _unusable(error: Exception) -> BadInput:
    said = f"{type(error).__name__}: {first_line(error, 200)}"
    return BadInput(f"a task cannot be run ({said})", "Correct it, or leave it out.")


def _leaves(loaded: Any) -> Iterator[tuple[str, Any]]:
    """Tasks by name, out of the groups that they are in."""
    for name, value in loaded.items():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield str(name), value


def _metrics(task: Any) -> list[str]:
    """The labels of a task's figures."""
    filters = [found.name for found in getattr(task, "_filters", [])] or ["none"]
    return [_label(name, kind) for name in task.aggregation() for kind in filters]


def _label(metric: str, kind: str) -> str:
    return metric if kind == "none" else f"{metric} ({kind})"


def _figures(found: Any) -> Iterator[TaskFigure]:
    for task, metrics in found["results"].items():
        counted: Any = found.get("n-samples", {}).get(task, {})
        for name, value in metrics.items():
            metric, _, kind = name.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not kind:
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            spread = float(error) if isinstance(error, int | float) else None
            yield TaskFigure(task, _label(metric, kind), float(value), spread, int(counted.get("effective", 0)))


def _by_example(found: Any) -> dict[tuple[str, str], dict[Any, float]]:
    values: dict[tuple[str, str], dict[Any, float]] = {}
    for task, samples in found.get("samples", {}).items():
        for sample in samples:
            for metric in sample.get("metrics", ()):
                value = sample.get(metric)
                if isinstance(value, int | float):
                    key = (str(task), _label(metric, sample.get("filter", "none")))
                    values.setdefault(key, {})[sample["doc_id"]] = float(value)
    return values


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """The harness and what it brings along write to the terminal as they like."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _no_bars():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _no_bars() -> Generator[None]:
    """Its bars go to standard error, where ours is."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
