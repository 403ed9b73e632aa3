"""What a bundle is worth: eval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pocketmoe.console.numbers import MOST_TOKENS, PATH, Whole
from pocketmoe.console.options import (
    bundle_argument,
    drop_cold_option,
    json_option,
    memory_option,
    prefer_cached_option,
    print_json,
    threads_option,
)
from pocketmoe.console.progress import ProgressBar

if TYPE_CHECKING:
    from pocketmoe.bundle.reader import Bundle, Progress
    from pocketmoe.profiles.quality.gate import Verdict
    from pocketmoe.profiles.quality.quality import Slice
    from pocketmoe.profiles.quality.report import LevelComparison
    from pocketmoe.runtime.engine.memory_plan import MemoryRequest
    from pocketmoe.runtime.engine.options import EngineOptions


@click.command("eval")
@bundle_argument
@click.option("--text", required=True, type=PATH, help="A text file, or a directory of *.txt.")
@click.option("--reference", type=PATH, help="The bundle to be compared with, say before quantizing.")
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
    "--resume",
    type=PATH,
    metavar="FILE",
    help="Note what is found there, and go on from it after a kill.",
)
@memory_option
@click.option("--max-tokens", type=Whole(2, MOST_TOKENS), help="Of each text, its first ones. Default: all.")
@drop_cold_option
@prefer_cached_option
@threads_option
@json_option
def evaluate(
    bundle: Path,
    text: Path,
    reference: Path | None,
    gate: Path | None,
    free: int,
    ood: tuple[str, ...],
    resume: Path | None,
    memory: MemoryRequest | None,
    max_tokens: int | None,
    drop_cold: float,
    prefer_cached: float,
    threads: int | None,
    as_json: bool,
) -> None:
    """Say how well BUNDLE predicts a text: perplexity; against a reference KL, top-1 and router agreement, and answers.

    Against a reference some gates always hold: no slice is far worse than the rest, and answers are no garbage.
    """
    from dataclasses import asdict, replace

    from pocketmoe.bundle.reader import Bundle
    from pocketmoe.console.tables import quality_table, verdict_table
    from pocketmoe.profiles.quality import quality
    from pocketmoe.profiles.quality.gate import Extent, judge, read_gate
    from pocketmoe.runtime.memory.budget import refuse_over_budget

    slices = quality.read_slices(text, ood)
    marks = {piece.out_of_distribution for piece in slices}
    extent = Extent([piece.name for piece in slices], len(marks) == 2, reference is not None, free)
    rules = read_gate(gate, extent) if gate else []
    options = _engine_options(memory, threads, drop_cold, prefer_cached)
    with ProgressBar() as bar:
        opened = Bundle.open(bundle)
        report = quality.evaluate(
            opened,
            slices,
            reference=Bundle.open(reference) if reference else None,
            options=options,
            max_tokens=max_tokens,
            free_prompts=free,
            journal=resume,
            progress=bar,
        )
        if reference and free:
            report = replace(report, levels=_compare_levels(opened, slices, options, bar))
    verdicts = judge(report, rules)
    if as_json:
        print_json(report, verdicts=[asdict(verdict) for verdict in verdicts])
    else:
        click.echo("\n\n".join(filter(None, [quality_table(report), verdict_table(verdicts)])))
    if report.seen.memory_budget_bytes is not None:
        refuse_over_budget(report.seen.peak_memory_bytes, report.seen.memory_budget_bytes)
    _refuse(verdicts)


def _engine_options(
    memory: MemoryRequest | None, threads: int | None, drop_cold: float, prefer_cached: float
) -> EngineOptions:
    from pocketmoe.runtime.engine.memory_plan import MemoryRequest
    from pocketmoe.runtime.engine.options import EngineOptions
    from pocketmoe.runtime.run import default_threads

    return EngineOptions(
        memory=memory or MemoryRequest(),
        threads=threads or default_threads(),
        drop_cold=drop_cold,
        prefer_cached=prefer_cached,
        capped=True,
    )


def _compare_levels(
    bundle: Bundle, slices: Sequence[Slice], options: EngineOptions, progress: Progress
) -> LevelComparison | None:
    """Beside the bundle, so that its experts need not be copied; nothing where that place cannot be written."""
    import os

    from pocketmoe.bundle.partial import partial_directory
    from pocketmoe.profiles.quality.levels import compare_levels

    beside = bundle.root.resolve()
    if not os.access(beside.parent, os.W_OK):
        return None
    with partial_directory(beside.with_name(f"{beside.name}-levels")) as scratch:
        return compare_levels(bundle, slices, scratch=scratch, options=options, progress=progress)


def _refuse(verdicts: Sequence[Verdict]) -> None:
    """Raises GateFailed where a verdict is against the bundle, with the rows that broke."""
    from pocketmoe.errors import GateFailed

    broken = [verdict for verdict in verdicts if not verdict.passed]
    if broken:
        raise GateFailed(
            f"{len(broken)} of {len(verdicts)} gates failed: {'; '.join(map(str, broken))}",
            "Quantize with more bits, or look at the slices that broke.",
        )
