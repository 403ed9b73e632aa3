"""`run --batch`: its options, and what it says while it answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pocketmoe.console.numbers import MOST_TOKENS, PATH, Whole
from pocketmoe.console.options import gathered, print_json, print_line
from pocketmoe.console.progress import ProgressBar
from pocketmoe.errors import BadInput
from pocketmoe.sizes import in_words, peak_in_words

if TYPE_CHECKING:
    from pocketmoe.batch.answering import BatchReport, BatchRequest
    from pocketmoe.batch.prompts import BatchPrompt
    from pocketmoe.runtime.run import RunRequest

_MOST_AT_ONCE = 256


@dataclass(frozen=True)
class BatchOptions:
    """Where the prompts are, where the answers go, how many are answered at once, how long a text may be."""

    file: Path
    output: Path | None
    at_once: int
    context: int | None


def _options(batch: Path | None, output: Path | None, sequences: int, context: int | None) -> BatchOptions | None:
    if batch is not None:
        return BatchOptions(batch, output, sequences, context)
    for name, given in (("--output", output), ("--sequences", sequences > 1), ("--context", context)):
        if given:
            raise click.UsageError(f"{name} goes with --batch.")
    return None


batch_options = gathered(
    "batch",
    _options,
    click.option(
        "--batch",
        type=PATH,
        metavar="FILE",
        help='Answer every line of FILE: a prompt or, in a *.jsonl, {"prompt": ...} or {"messages": ...}, with an "id" '
        "where you like.",
    ),
    click.option(
        "-o",
        "--output",
        type=PATH,
        metavar="FILE",
        help="Where the answers of --batch go, as JSON lines. Started again after a kill, it answers what is left. "
        "Default: standard output.",
    ),
    click.option(
        "--sequences",
        type=Whole(1, _MOST_AT_ONCE),
        default=1,
        show_default=True,
        metavar="N",
        help="Prompts of --batch that are answered at once. Each takes memory for its text.",
    ),
    click.option(
        "--context",
        type=Whole(2, MOST_TOKENS),
        metavar="N",
        help="The longest text of --batch in tokens, prompt and answer. Default: 4096, or the model's own.",
    ),
)


def answer_file(bundle: Path, request: RunRequest, batch: BatchOptions, *, as_json: bool, quiet: bool) -> None:
    """Answer all prompts of a file; a summary on stderr, or with `as_json` on stdout where the answers go to a file.

    Raises BadInput where prompts were refused, after the others are answered.
    """
    from pocketmoe.batch.answering import answer_batch
    from pocketmoe.bundle.progress import no_progress
    from pocketmoe.runtime.memory.budget import refuse_over_budget

    with ProgressBar() as bar:

        def show(record: dict[str, Any]) -> None:
            if batch.output is None:
                bar.clear()
                print_line(**record)

        def refuse(prompt: BatchPrompt, error: BadInput) -> None:
            bar.clear()
            click.echo(f"Prompt {prompt.id!r}: {error.one_line()}", err=True)

        report = answer_batch(bundle, _batch_request(request, batch), show, refuse, no_progress if quiet else bar)
    if as_json and batch.output is not None:
        print_json(report)
    elif not quiet:
        click.echo(_summary(report), err=True)
    if report.refused:
        remedy = "Shorten them, or give a larger --context; the same command answers them alone."
        raise BadInput(f"{report.refused} of {report.prompts} prompts were refused", remedy)
    refuse_over_budget(report.peak_memory_bytes, report.memory_budget_bytes)


def _batch_request(request: RunRequest, batch: BatchOptions) -> BatchRequest:
    """What `run` was asked for, of every prompt of the file."""
    from pocketmoe.batch.answering import BatchRequest
    from pocketmoe.runtime.model import LoadRequest

    sampling = {**asdict(request.sampling), "logit_bias": dict(request.sampling.logit_bias)}
    return BatchRequest(
        file=batch.file,
        output=batch.output,
        load=LoadRequest(
            memory=request.memory,
            context=batch.context,
            threads=request.threads,
            backend=request.backend,
            prefetch=request.prefetch,
            drop_cold=request.drop_cold,
            prefer_cached=request.prefer_cached,
            sequences=batch.at_once,
            prefix_cache=request.prefix_cache,
            packed=request.packed,
        ),
        options={
            **sampling,
            "max_tokens": request.max_tokens,
            "stop": request.stop,
            "logprobs": request.top_logprobs,
            "raw": request.raw,
            "template": dict(request.template),
            **({request.constraint.kind: request.constraint.source} if request.constraint else {}),
        },
        before=request.messages,
        n=request.n,
        at_once=batch.at_once,
    )


def _summary(report: BatchReport) -> str:
    before = f", {report.answered_before} before" if report.answered_before else ""
    refused = f", {report.refused} refused" if report.refused else ""
    line = f"{report.answered} of {report.prompts} prompts answered{before}{refused}"
    if not report.answered:
        return f"[{line}]"
    rate = report.generated_tokens / report.seconds
    memory = f"memory {peak_in_words(report.peak_memory_bytes)} of {in_words(report.memory_budget_bytes)}"
    return f"[{line}; {report.generated_tokens} tokens in {report.seconds:.1f} s, {rate:.1f} tokens/s; {memory}]"
