"""run: text from a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from pocketmoe.console.batch import BatchOptions, answer_file, batch_options
from pocketmoe.console.numbers import PATH, TOKENS, Whole
from pocketmoe.console.options import (
    backend_option,
    bundle_argument,
    drop_cold_option,
    examples,
    find_bundle,
    gathered,
    json_option,
    memory_option,
    packed_dir_option,
    prefer_cached_option,
    prefix_cache_options,
    print_json,
    print_line,
    threads_option,
    usage,
)
from pocketmoe.console.progress import ProgressBar
from pocketmoe.console.sampling import constraint_options, sampling_options, template_option

if TYPE_CHECKING:
    from pocketmoe.grammar.constraint import Constraint
    from pocketmoe.runtime.engine.memory_plan import MemoryRequest
    from pocketmoe.runtime.generate import RunReport
    from pocketmoe.runtime.prefix_cache.kept import PrefixCacheRequest
    from pocketmoe.runtime.run import RunRequest

_TRACE_WARNING = (
    "A trace reveals the text: expert ids alone reconstruct 91% of the tokens (arXiv 2602.04105). Keep it to yourself."
)


@click.command(
    epilog=examples(
        "pocketmoe run SMALL 'To create an index, use the' --memory 4GB",
        "pocketmoe run SMALL -f question.txt --memory 40% --temperature 0.7 --seed 1",
        "echo 'What is a mixture of experts?' | pocketmoe run SMALL --json",
        "pocketmoe run SMALL --system 'Be brief.' --stop END 'What is a fox?' -v",
        "pocketmoe run SMALL -n 3 --temperature 0.8 --logprobs 2 --json 'A name for a fox:'",
        "pocketmoe run SMALL --json-schema answer.schema.json 'Who wrote Emma, and when?'",
        "pocketmoe run SMALL --regex '[1-9][0-9]{3}' 'When was Emma published?'",
        "pocketmoe run SMALL --batch prompts.jsonl -o answers.jsonl",
    )
)
@bundle_argument
@click.argument("prompt_argument", metavar="[PROMPT]", required=False)
@click.option(
    "-p",
    "--prompt",
    metavar="TEXT",
    help="What to continue or, for a chat model, what to answer. Without it, and for -: standard input.",
)
@click.option("-f", "--file", type=PATH, metavar="FILE", help="A file with the prompt, of any length.")
@click.option("--system", metavar="TEXT", help="What a chat model is told first.")
@click.option(
    "--messages",
    type=PATH,
    metavar="FILE",
    help="A conversation to be answered, or to precede the prompt: JSON messages, or what chat saved.",
)
@memory_option
@click.option("--max-tokens", type=TOKENS, default=128, show_default=True, help="The longest answer.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this; may be given again.")
@constraint_options
@sampling_options(by_authors=False)
@gathered(
    "several",
    dict,
    click.option(
        "-n", "--answers", "n", type=Whole(1, 1024), default=1, show_default=True, help="So many answers to one prompt."
    ),
    click.option(
        "--logprobs",
        "top_logprobs",
        type=Whole(0, 1000),
        metavar="N",
        help="Give each token's log probability in --json, and those of the N likeliest tokens.",
    ),
)
@template_option
@batch_options
@prefix_cache_options
@gathered(
    "engine",
    dict,
    threads_option,
    backend_option,
    click.option(
        "--prefetch",
        type=click.Choice(["auto", "on", "off"], case_sensitive=False),
        default="auto",
        show_default=True,
        help="Read what the next layer will probably want while the disk is idle; auto: where that is faster.",
    ),
    drop_cold_option,
    prefer_cached_option,
    packed_dir_option,
)
@click.option("--raw", is_flag=True, help="Give the prompt as it is, without the model's chat template.")
@click.option(
    "--trace",
    type=PATH,
    metavar="FILE",
    help="Record which experts each token was routed to, for `replay`. Whoever has the file can tell most of the text.",
)
@json_option
@click.option(
    "--jsonl", "as_lines", is_flag=True, help="Print pieces of text as JSON lines, and last what --json prints."
)
@click.option("-v", "--verbose", is_flag=True, help="Say all that was measured, not a line of it.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but the answer.")
def run(
    bundle: str,
    prompt_argument: str | None,
    prompt: str | None,
    file: Path | None,
    memory: MemoryRequest | None,
    system: str | None,
    messages: Path | None,
    max_tokens: int,
    stop: tuple[str, ...],
    constraint: Constraint | None,
    sampling: dict[str, Any],
    several: dict[str, Any],
    template: tuple[tuple[str, Any], ...],
    batch: BatchOptions | None,
    prefix_cache: PrefixCacheRequest | None,
    engine: dict[str, Any],
    raw: bool,
    trace: Path | None,
    as_json: bool,
    as_lines: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Generate text with BUNDLE, within the memory given.

    Experts are paged in from disk.
    """
    from pocketmoe.runtime.memory.budget import refuse_over_budget
    from pocketmoe.runtime.run import RunRequest
    from pocketmoe.runtime.sampling import Sampling

    places = (prompt_argument, prompt, file)
    _refuse_both((verbose, quiet), (as_json, as_lines), (raw, system or messages), (batch, trace), (batch, any(places)))
    with usage():
        request = RunRequest(
            prompt=_prompt(places, is_needed=not (messages or batch)),
            raw=raw,
            messages=_messages(system, messages),
            memory=memory,
            max_tokens=max_tokens,
            sampling=Sampling(**sampling),
            stop=stop,
            constraint=constraint,
            trace=trace,
            prefix_cache=prefix_cache,
            template=dict(template),
            **several,
            **engine,
        )
    root = find_bundle(bundle, quiet=quiet)
    if batch:
        return answer_file(root, request, batch, as_json=as_json, quiet=quiet)
    report = _run(root, request, "none" if as_json else "lines" if as_lines else "text", is_quiet=quiet)
    _say(report, as_json=as_json or as_lines, verbose=verbose, quiet=quiet)
    return refuse_over_budget(report.peak_memory_bytes, report.memory_budget_bytes)


def _say(report: RunReport, as_json: bool, verbose: bool, quiet: bool) -> None:
    from pocketmoe.console.tables import run_line, run_table

    if as_json:
        print_json(report)
        return
    click.echo()
    if not quiet:
        click.echo(run_table(report) if verbose else run_line(report), err=True)


def _prompt(places: tuple[str | None, str | None, Path | None], is_needed: bool) -> str:
    from pocketmoe.console.prompt import read_prompt

    return read_prompt(*places) if is_needed or any(place is not None for place in places) else ""


def _messages(system: str | None, file: Path | None) -> tuple[dict[str, Any], ...]:
    from pocketmoe.console.prompt import read_messages

    told = [{"role": "system", "content": system}] if system else []
    return (*told, *(read_messages(file) if file else []))


def _refuse_both(*pairs: tuple[object, object]) -> None:
    words = (
        "Choose --verbose or --quiet.",
        "Choose --json or --jsonl.",
        "--raw goes without --system and --messages.",
        "A trace is of one answer: choose --batch or --trace.",
        "Choose a prompt or --batch.",
    )
    for (one, other), word in zip(pairs, words, strict=True):
        if one and other:
            raise click.UsageError(word)


def _run(bundle: Path, request: RunRequest, shown: Literal["text", "lines", "none"], is_quiet: bool) -> RunReport:
    """Run with a progress bar on stderr, and on stdout the text as it comes."""
    from pocketmoe.bundle.progress import no_progress
    from pocketmoe.runtime.run import run_prompt

    if request.trace:
        instead = " in the place of what is there" if request.trace.exists() else ""
        click.echo(f"Recording to {request.trace}{instead}. {_TRACE_WARNING}", err=True)
    with ProgressBar() as bar:
        begun = 0

        def show(piece: str, index: int) -> None:
            nonlocal begun
            bar.clear()
            if shown == "text":
                click.echo("\n" * (index - begun) + piece, nl=False)
            elif shown == "lines":
                print_line(text=piece, **({"answer": index} if request.n > 1 else {}))
            begun = index

        return run_prompt(bundle, request, on_text=show, progress=no_progress if is_quiet else bar)
