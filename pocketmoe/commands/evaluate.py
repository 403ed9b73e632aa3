"""eval: what a bundle is worth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pocketmoe.console.numbers import BUNDLE, MOST_TOKENS, PATH, Whole
from pocketmoe.console.options import (
    bundle_argument,
    drop_cold_option,
    examples,
    find_bundle,
    json_option,
    memory_option,
    prefer_cached_option,
    print_json,
    threads_option,
)
from pocketmoe.console.progress import ProgressBar

if TYPE_CHECKING:
    from pocketmoe.runtime.engine.memory_plan import MemoryRequest


@click.command(
    "eval",
    epilog=examples(
        "pocketmoe eval SMALL --text texts/",
        "pocketmoe eval SMALL --reference BUNDLE --text texts/ --gate release.gate -o release/",
    ),
)
@bundle_argument
@click.option("--text", required=True, type=PATH, help="A text file, or a directory of *.txt.")
@click.option("--reference", type=BUNDLE, help="The bundle to be compared with, say before quantizing.")
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
@click.option(
    "-o",
    "--output",
    type=PATH,
    metavar="DIR",
    help="File what was found there: eval.json, eval.html, and MODEL_CARD.md with the verdict.",
)
@memory_option
@click.option("--max-tokens", type=Whole(2, MOST_TOKENS), help="Of each text, its first ones. Default: all.")
@drop_cold_option
@prefer_cached_option
@threads_option
@json_option
def evaluate(
    bundle: str,
    text: Path,
    reference: str | None,
    gate: Path | None,
    free: int,
    ood: tuple[str, ...],
    resume: Path | None,
    output: Path | None,
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
    import msgspec

    from pocketmoe.console.tables import quality_table, verdict_table
    from pocketmoe.profiles.filing.page import evaluate_and_file
    from pocketmoe.profiles.quality.evaluation import EvalRequest
    from pocketmoe.profiles.quality.gate import refuse_broken
    from pocketmoe.runtime.memory.budget import refuse_over_budget

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
    )
    with ProgressBar() as bar:
        report, verdicts = evaluate_and_file(find_bundle(bundle), request, output, bar)
    if as_json:
        print_json(report, verdicts=msgspec.to_builtins(verdicts))
    else:
        click.echo("\n\n".join(filter(None, [quality_table(report), verdict_table(verdicts)])))
    if report.seen.memory_budget_bytes is not None:
        refuse_over_budget(report.seen.peak_memory_bytes, report.seen.memory_budget_bytes)
    refuse_broken(verdicts)
