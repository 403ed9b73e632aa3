"""eval: what a bundle is worth."""

from __future__ import annotations

import os
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
    packed_dir_option,
    prefer_cached_option,
    print_json,
    threads_option,
    usage,
)
from pocketmoe.console.progress import ProgressBar

if TYPE_CHECKING:
    from pocketmoe.bundle.packed import PackedPlace
    from pocketmoe.harness.tasks import TasksRequest
    from pocketmoe.pipeline.evaluate import Evaluation
    from pocketmoe.runtime.engine.memory_plan import MemoryRequest


def _tasks_request(tasks: str | None, task_dir: Path | None, limit: int | None) -> TasksRequest | None:
    """Where the tasks are the user's own, nothing is downloaded; the harness' own fetch what they are made of."""
    if tasks is None:
        if task_dir or limit:
            raise click.UsageError("--task-dir and --limit go with --tasks.")
        return None
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if task_dir is not None:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    from pocketmoe.harness.tasks import TasksRequest

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    return TasksRequest(tasks=names, folder=task_dir, limit=limit)


_task_options = gathered(
    "tasks",
    _tasks_request,
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
    help="Limits, one a line: 'mean_kl <= 0.02', 'worst: top1 >= 0.9', 'TASK: acc_fall <= 0.02'. Exit 5 if one does "
    "not hold (docs/EVAL.md).",
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
@packed_dir_option
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
    tasks: TasksRequest | None,
    memory: MemoryRequest | None,
    max_tokens: int | None,
    drop_cold: float,
    prefer_cached: float,
    threads: int | None,
    packed: PackedPlace | None,
    as_json: bool,
) -> None:
    """Say how well BUNDLE predicts a text.

    Perplexity; against a reference also KL, top-1 and router agreement, and answers of its own. Against a reference
    some gates always hold: no slice is far worse than the rest, and answers are no garbage.
    """
    from pocketmoe.pipeline import evaluate as pipeline
    from pocketmoe.profiles.quality.evaluation import EvalRequest

    root = find_bundle(bundle)
    by = EvalRequest(
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
        packed=packed,
    )
    with usage():
        request = pipeline.EvaluateRequest(by=by, tasks=tasks, output=output)
    with ProgressBar() as bar:
        found = pipeline.evaluate(root, request, bar)
    _show(found, as_json)


def _show(found: Evaluation, as_json: bool) -> None:
    """What was found; then the refusals that it leads to."""
    import msgspec

    from pocketmoe.console.tables import quality_table, task_table, verdict_table
    from pocketmoe.profiles.quality.gate import refuse_broken
    from pocketmoe.runtime.memory.budget import refuse_over_budget

    report = found.report
    if as_json:
        parts = {"tasks": msgspec.to_builtins(found.tasks)} if found.tasks else {}
        parts |= {"verdicts": msgspec.to_builtins(found.verdicts)} if report or found.verdicts else {}
        print_json(report or {}, **parts)
    else:
        told = [quality_table(report) if report else "", task_table(found.tasks), verdict_table(found.verdicts)]
        click.echo("\n\n".join(filter(None, told)))
    if report and report.seen.memory_budget_bytes is not None:
        refuse_over_budget(report.seen.peak_memory_bytes, report.seen.memory_budget_bytes)
    refuse_broken(found.verdicts)
