"""replay: a recorded run at other budgets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pocketmoe.console.numbers import PATH, MemoryList
from pocketmoe.console.options import PolicyName, examples, json_option, print_json
from pocketmoe.console.progress import ProgressBar

if TYPE_CHECKING:
    from pocketmoe.runtime.engine.memory_plan import MemoryRequest


@click.command(
    epilog=examples("pocketmoe run SMALL --prompt '...' --trace run.npy", "pocketmoe replay run.npy --memory 25%,2GB")
)
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
@click.option(
    "--policy", type=PolicyName(), multiple=True, help="This one; may be given again. Default: the one that `run` has."
)
@click.option("--all", "every", is_flag=True, help="Every policy that there is.")
@json_option
def replay(
    trace: Path,
    memory: list[tuple[str, MemoryRequest]],
    bundle: Path | None,
    policy: tuple[str, ...],
    every: bool,
    as_json: bool,
) -> None:
    """Say what other budgets would do with a TRACE.

    How often experts would be in memory, and what would be read, for what `run --trace` recorded: without prefetch, and
    for the tokens after the prompt.
    """
    from pocketmoe.bundle.reader import Bundle
    from pocketmoe.console.tables import replay_table
    from pocketmoe.profiles.routing.policies import POLICIES, PRODUCT
    from pocketmoe.profiles.routing.replay import replay as replay_trace
    from pocketmoe.runtime.trace import read_trace

    with ProgressBar() as bar:
        opened = Bundle.open(bundle) if bundle else None
        policy = tuple(POLICIES) if every else policy or (PRODUCT,)
        report = replay_trace(trace, read_trace(trace), memory, policy, bundle=opened, progress=bar)
    if as_json:
        print_json(report)
    else:
        click.echo(replay_table(report))
