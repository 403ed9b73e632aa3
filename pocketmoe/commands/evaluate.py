"""eval: what a bundle is worth."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pocketmoe.console.numbers import BUNDLE, MOST_TOKENS, PATH, Whole
from pocketmoe.console.options import (
    bundle_argument,
    drop_cold_option,
    examples,
    find_bundle,
    gathered,
    json_option,
    memory_option,
    prefer_cached_option,
    print_json,
    require,
    threads_option,
)
from pocketmoe.console.progress import ProgressBar

if TYPE_CHECKING:
    from pocketmoe.harness.tasks import TaskFigure
    from pocketmoe.profiles.quality.evaluation import EvalRequest
    from pocketmoe.profiles.quality.models import ReferenceModel
    from pocketmoe.runtime.engine.memory_plan import MemoryRequest


@dataclass(frozen=True)
class TasksAsked:
    """Of lm-evaluation-harness."""

    tasks: str | None
    task_dir: Path | None
    limit: int | None


_task_options = gathered(
    "asked",
    TasksAsked,
    click.option("--tasks", metavar="NAMES", help="Of lm-evaluation-harness, with commas between (extra lm-eval)."),
    click.option("--task-dir", type=PATH, metavar="DIR", help="Task files of yours: only these, and no network."),
    click.option("--limit", type=Whole(1, 1_000_000), metavar="N", help="Of each task, its first examples."),
)


@click.command(
    "eval",
    epilog=examples(
        "pocketmoe eval SMALL --text texts/",
        "pocketmoe eval SMALL --tasks heldout_choice --task-dir tasks/",
        "pocketmoe eval SMALL --reference BUNDLE --text texts/ --gate release.gate -o release/",
    ),
)
@bundle_argument
@click.option("--text", type=PATH, help="A text file, or a directory of *.txt.")
@click.option(
    "--reference",
    type=BUNDLE,
    metavar="BUNDLE|CHECKPOINT",
    help="What to compare with: a bundle, or the checkpoint itself as transformers runs it, with all of it in memory.",
)
@click.option(
    "--gate",
    type=PATH,
    metavar="FILE",
    help="Limits, one a line: 'mean_kl <= 0.02', 'worst: top1 >= 0.9'. Exit 5 if one does not hold (docs/EVAL.md).",
)
@click.option(
    "--free",
    type=Whole(0, 100_000),
    default=16,
    show_default=True,
    help="Prompts out of the texts that both bundles answer; only with --reference.",
)
@click.option(
    "--ood",
    multiple=True,
    metavar="NAME",
    help="A text of a kind that calibration did not see, by its file's name; may be given again. Always: ood*.",
)
@click.option(
    "--pairs",
    type=PATH,
    metavar="FILE",
    help='The same sentence about two groups, a line each: {"a": ..., "b": ..., "kind": ...} (docs/EVAL.md).',
)
@click.option(
    "--resume",
    type=PATH,
    metavar="FILE",
    help="Note what is found there, and go on from it after a kill.",
)
@click.option(
    "-o",
    "--output",
    type=PATH,
    metavar="DIR",
    help="File what was found there: eval.json, eval.html, and MODEL_CARD.md with the verdict.",
)
@_task_options
@memory_option
@click.option("--max-tokens", type=Whole(2, MOST_TOKENS), help="Of each text, its first ones. Default: all.")
@drop_cold_option
@prefer_cached_option
@threads_option
@json_option
def evaluate(
    bundle: str,
    text: Path | None,
    reference: str | None,
    gate: Path | None,
    free: int,
    ood: tuple[str, ...],
    pairs: Path | None,
    resume: Path | None,
    output: Path | None,
    asked: TasksAsked,
    memory: MemoryRequest | None,
    max_tokens: int | None,
    drop_cold: float,
    prefer_cached: float,
    threads: int | None,
    as_json: bool,
) -> None:
    """Say how well BUNDLE predicts a text.

    Perplexity; against a reference also KL, top-1 and router agreement, and answers of its own. Against a reference
    some gates always hold: no slice is far worse than the rest, and answers are no garbage.
    """
    from pocketmoe.profiles.quality.evaluation import EvalRequest

    if text is None and (output or not asked.tasks):
        raise click.UsageError("Give --text TEXT" + (", which -o files." if asked.tasks else ", or --tasks NAMES."))
    found = find_bundle(bundle)
    tasks = _run_tasks(found, asked, memory, threads) if asked.tasks else None
    if text is None:
        _show_tasks(tasks or [], as_json)
        return
    request = EvalRequest(
        text=text,
        reference=find_bundle(reference) if reference else None,
        gate=gate,
        free_prompts=free,
        out_of_distribution=ood,
        journal=resume,
        memory=memory,
        max_tokens=max_tokens,
        drop_cold=drop_cold,
        prefer_cached=prefer_cached,
        threads=threads,
        pairs=pairs,
    )
    _evaluate(found, request, output, tasks, as_json)


def _evaluate(
    bundle: Path, request: EvalRequest, output: Path | None, tasks: list[TaskFigure] | None, as_json: bool
) -> None:
    import msgspec

    from pocketmoe.console.tables import quality_table, task_table, verdict_table
    from pocketmoe.profiles.filing.page import evaluate_and_file
    from pocketmoe.profiles.quality.gate import refuse_broken
    from pocketmoe.runtime.memory.budget import refuse_over_budget

    with ProgressBar() as bar:
        report, verdicts = evaluate_and_file(bundle, request, output, bar, _open_checkpoint, tasks or ())
    if as_json:
        more = {"tasks": msgspec.to_builtins(tasks)} if tasks is not None else {}
        print_json(report, verdicts=msgspec.to_builtins(verdicts), **more)
    else:
        parts = [quality_table(report), task_table(tasks or []), verdict_table(verdicts)]
        click.echo("\n\n".join(filter(None, parts)))
    if report.seen.memory_budget_bytes is not None:
        refuse_over_budget(report.seen.peak_memory_bytes, report.seen.memory_budget_bytes)
    refuse_broken(verdicts)


def _run_tasks(bundle: Path, asked: TasksAsked, memory: MemoryRequest | None, threads: int | None) -> list[TaskFigure]:
    """Where the tasks are the user's own, nothing is downloaded; the harness' own fetch what they are made of."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if asked.task_dir is not None:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    from pocketmoe.harness.tasks import TasksRequest, run_tasks

    names = [name.strip() for name in (asked.tasks or "").split(",") if name.strip()]
    request = TasksRequest(tasks=names, folder=asked.task_dir, limit=asked.limit, memory=memory, threads=threads)
    with ProgressBar() as bar:
        return run_tasks(bundle, request, bar)


def _show_tasks(tasks: list[TaskFigure], as_json: bool) -> None:
    import msgspec

    from pocketmoe.console.tables import task_table

    click.echo(msgspec.json.encode({"tasks": tasks}).decode() if as_json else task_table(tasks))


def _open_checkpoint(path: Path, threads: int) -> ReferenceModel:
    require("torch", "eval --reference CHECKPOINT")
    require("transformers", "eval --reference CHECKPOINT")
    from pocketmoe.export.reference import TransformersModel

    return TransformersModel(path, threads)
