"""Text from a bundle: run, replay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pocketmoe.console.numbers import PATH, SEED, TOKENS, MemoryList, Number
from pocketmoe.console.options import (
    PolicyName,
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
    from pocketmoe.runtime.backends.choice import BackendName
    from pocketmoe.runtime.engine.memory_plan import MemoryRequest
    from pocketmoe.runtime.paging.prefetch import PrefetchMode

_TRACE_WARNING = (
    "A trace reveals the text: expert ids alone reconstruct 91% of the tokens (arXiv 2602.04105). Keep it to yourself."
)


@click.command()
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
    """Generate text with BUNDLE, paging experts in from disk within the memory given."""
    from pocketmoe.console.prompt import read_prompt
    from pocketmoe.console.tables import run_table
    from pocketmoe.runtime.memory.budget import refuse_over_budget
    from pocketmoe.runtime.run import RunRequest, run_prompt
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
    with ProgressBar() as bar:

        def show(piece: str) -> None:
            bar.clear()
            if not as_json:
                click.echo(piece, nl=False)

        report = run_prompt(bundle, request, on_text=show, progress=bar)
    if as_json:
        print_json(report)
    else:
        click.echo()
        click.echo(run_table(report), err=True)
    refuse_over_budget(report.peak_memory_bytes, report.memory_budget_bytes)


@click.command()
@click.argument("trace", type=PATH)
@click.option(
    "--memory",
    type=MemoryList(),
    metavar="LIST",
    default="6.25%,12.5%,25%,50%,75%",
    show_default=True,
    help="Budgets: shares of the experts, or sizes of the whole process.",
)
@click.option("--bundle", type=PATH, help="Whose sizes to reckon with. Default: the trace's.")
@click.option("--policy", type=PolicyName(), multiple=True, help="Only this one; may be given again. Default: all.")
@json_option
def replay(
    trace: Path, memory: list[tuple[str, MemoryRequest]], bundle: Path | None, policy: tuple[str, ...], as_json: bool
) -> None:
    """Say how often experts would be in memory, and what would be read, for a TRACE that `run --trace` recorded.

    Without prefetch, and for the tokens after the prompt.
    """
    from pocketmoe.bundle.reader import Bundle
    from pocketmoe.console.tables import replay_table
    from pocketmoe.profiles.routing.replay import replay as replay_trace
    from pocketmoe.runtime.trace import read_trace

    with ProgressBar() as bar:
        opened = Bundle.open(bundle) if bundle else None
        report = replay_trace(trace, read_trace(trace), memory, policy, bundle=opened, progress=bar)
    if as_json:
        print_json(report)
    else:
        click.echo(replay_table(report))
