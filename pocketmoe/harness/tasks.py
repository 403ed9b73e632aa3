"""The entry of `eval --tasks`: tasks of lm-evaluation-harness on a bundle, and the figures that they come to."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import BadInput
from pocketmoe.harness.model import Scorer, make_model
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.run import default_threads
from pocketmoe.runtime.tokenizer import Text

MOST_TOKENS = 4096  # that are read at once, less where the model's context is shorter
INSTALL = "Install it, from a clone of the project: pip install '.[lm-eval]'."


@dataclass(frozen=True, kw_only=True)
class TasksRequest:
    """Which tasks. `folder`: of the user's own task files; the harness' tasks are left out then.

    `limit`: of each task, its first examples. `threads` None: one per physical core.
    """

    tasks: Sequence[str]
    folder: Path | None = None
    limit: int | None = None
    memory: MemoryRequest | None = None
    threads: int | None = None


@dataclass(frozen=True)
class TaskFigure:
    """One metric of one task, as the harness computes it; `stderr` None where it knows none."""

    task: str
    metric: str
    value: float
    stderr: float | None
    examples: int


def run_tasks(bundle: Path, request: TasksRequest, progress: Progress = no_progress) -> list[TaskFigure]:
    """Run them all. Raises BadInput for tasks that are not known or cannot be run, and what an engine raises."""
    opened = Bundle.open(bundle)
    length = min(MOST_TOKENS, opened.manifest.model.context_length)
    try:
        with _quiet():
            harness: Any = importlib.import_module("lm_eval")
            manager: Any = importlib.import_module("lm_eval.tasks").TaskManager(
                include_path=str(request.folder) if request.folder else None, include_defaults=request.folder is None
            )
    except ImportError as error:
        raise BadInput(f"eval --tasks needs lm-evaluation-harness ({error})", INSTALL) from error
    unknown = [task for task in request.tasks if task not in manager.all_tasks]
    if unknown:
        known = ", ".join(sorted(manager.all_tasks)[:20])
        raise BadInput(f"no task is named {', '.join(unknown)}", f"There are: {known or 'none'}.")
    options = EngineOptions(
        memory=request.memory or MemoryRequest(),
        threads=request.threads or default_threads(),
        capacity=length,
        capped=True,
    )
    with Engine(opened, options, progress) as engine:
        model = make_model(Scorer(engine, Text(opened), length), lambda n, of: progress("running tasks", n, of))
        try:
            with _quiet():
                found: Any = harness.simple_evaluate(
                    model=model,
                    tasks=[*request.tasks],
                    task_manager=manager,
                    limit=request.limit,
                    bootstrap_iters=1000,
                    log_samples=False,
                )
        except (KeyError, ValueError, TypeError, OSError, RuntimeError, ImportError, AssertionError) as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BadInput(
                f"a task cannot be run ({type(error).__name__}: {said[:200]})", "Correct it, or leave it out."
            ) from error
    return list(_figures(found))


def _figures(found: Any) -> Iterator[TaskFigure]:
    for task, metrics in found["results"].items():
        counted: Any = found.get("n-samples", {}).get(task, {})
        for name, value in metrics.items():
            metric, _, kind = name.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not kind:
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            label = metric if kind == "none" else f"{metric} ({kind})"
            spread = float(error) if isinstance(error, int | float) else None
            yield TaskFigure(task, label, float(value), spread, int(counted.get("effective", 0)))


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
