"""run: text from a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pocketmoe.console.numbers import PATH, SEED, TOKENS, Number
from pocketmoe.console.options import (
    bundle_argument,
    drop_cold_option,
    examples,
    json_option,
    memory_option,
    prefer_cached_option,
    print_json,
    threads_option,
)
from pocketmoe.console.progress import ProgressBar

if TYPE_CHECKING:
    from pocketmoe.runtime.backends.choice import BackendName
    from pocketmoe.runtime.engine.memory_plan import MemoryRequest
    from pocketmoe.runtime.generate import RunReport
    from pocketmoe.runtime.paging.prefetch import PrefetchMode
    from pocketmoe.runtime.run import RunRequest

_TRACE_WARNING = (
    "A trace reveals the text: expert ids alone reconstruct 91% of the tokens (arXiv 2602.04105). Keep it to yourself."
)


@click.command(
    epilog=examples(
        "pocketmoe run SMALL 'To create an index, use the' --memory 4GB",
        "pocketmoe run SMALL -f question.txt --memory 40% --temperature 0.7 --seed 1",
        "echo 'What is a mixture of experts?' | pocketmoe run SMALL --json",
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
@memory_option
@click.option("--max-tokens", type=TOKENS, default=128, show_default=True, help="The longest answer.")
@click.option("--temperature", type=Number(0, 1000), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=Number(0, 1, open_below=True), default=1.0, show_default=True, help="Nucleus sampling.")
@click.option("--seed", type=SEED, metavar="N", help="For the same samples again.")
@threads_option
@click.option("--backend", type=click.Choice(["auto", "slots", "sessions"]), default="auto", show_default=True)
@click.option(
    "--prefetch",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Read what the next layer will probably want while the disk is idle; auto: where that is faster.",
)
@drop_cold_option
@prefer_cached_option
@click.option("--raw", is_flag=True, help="Give the prompt as it is, without the model's chat template.")
@click.option(
    "--trace",
    type=PATH,
    metavar="FILE",
    help="Record which experts each token was routed to, for `replay`. Whoever has the file can tell most of the text.",
)
@json_option
def run(
    bundle: Path,
    prompt_argument: str | None,
    prompt: str | None,
    file: Path | None,
    memory: MemoryRequest | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    threads: int | None,
    backend: BackendName,
    prefetch: PrefetchMode,
    drop_cold: float,
    prefer_cached: float,
    raw: bool,
    trace: Path | None,
    as_json: bool,
) -> None:
    """Generate text with BUNDLE, within the memory given.

    Experts are paged in from disk.
    """
    from pocketmoe.console.prompt import read_prompt
    from pocketmoe.console.tables import run_table
    from pocketmoe.runtime.memory.budget import refuse_over_budget
    from pocketmoe.runtime.run import RunRequest
    from pocketmoe.runtime.sampling import Sampling

    request = RunRequest(
        prompt=read_prompt(prompt_argument, prompt, file),
        raw=raw,
        memory=memory,
        max_tokens=max_tokens,
        sampling=Sampling(temperature, top_p, seed),
        threads=threads,
        backend=backend,
        prefetch=prefetch,
        drop_cold=drop_cold,
        prefer_cached=prefer_cached,
        trace=trace,
    )
    if trace:
        click.echo(f"Recording to {trace}. {_TRACE_WARNING}", err=True)
    report = _run(bundle, request, is_shown=not as_json)
    if as_json:
        print_json(report)
    else:
        click.echo()
        click.echo(run_table(report), err=True)
    refuse_over_budget(report.peak_memory_bytes, report.memory_budget_bytes)


def _run(bundle: Path, request: RunRequest, is_shown: bool) -> RunReport:
    """Run with a progress bar on stderr, the text on stdout as it comes."""
    from pocketmoe.runtime.run import run_prompt

    with ProgressBar() as bar:

        def show(piece: str) -> None:
            bar.clear()
            if is_shown:
                click.echo(piece, nl=False)

        return run_prompt(bundle, request, on_text=show, progress=bar)
