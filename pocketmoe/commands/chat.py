"""A conversation in the terminal: chat."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pocketmoe.console.numbers import MOST_TOKENS, PATH, TOKENS, Whole
from pocketmoe.console.options import (
    bundle_argument,
    drop_cold_option,
    examples,
    find_bundle,
    memory_option,
    packed_dir_option,
    prefer_cached_option,
    prefix_cache_options,
    threads_option,
)
from pocketmoe.console.progress import ProgressBar
from pocketmoe.console.sampling import sampling_options, template_option

if TYPE_CHECKING:
    from pocketmoe.bundle.packed import PackedPlace
    from pocketmoe.runtime.engine.memory_plan import MemoryRequest
    from pocketmoe.runtime.prefix_cache.kept import PrefixCacheRequest


@click.command(
    epilog=examples(
        "pocketmoe chat SMALL --memory 4GB",
        "pocketmoe chat SMALL --memory 40% --system 'Be brief.' --temperature 0",
        "printf 'What is a fox?\\nWhat does it eat?\\n' | pocketmoe chat SMALL > answers.txt",
    )
)
@bundle_argument
@memory_option
@click.option(
    "--context",
    type=Whole(2, MOST_TOKENS),
    metavar="N",
    help="The longest conversation in tokens, for which memory is set aside. Default: 4096, or the model's own.",
)
@click.option("--max-tokens", type=TOKENS, metavar="N", help="The longest answer. Default: what the context holds.")
@click.option("--system", metavar="TEXT", help="What the model is told first.")
@click.option("--load", "saved", type=PATH, metavar="FILE", help="Go on from a conversation that /save has written.")
@sampling_options(by_authors=True)
@template_option
@threads_option
@drop_cold_option
@prefer_cached_option
@prefix_cache_options
@packed_dir_option
def chat(
    bundle: str,
    memory: MemoryRequest | None,
    context: int | None,
    max_tokens: int | None,
    system: str | None,
    saved: Path | None,
    threads: int | None,
    drop_cold: float,
    prefer_cached: float,
    prefix_cache: PrefixCacheRequest | None,
    packed: PackedPlace | None,
    sampling: dict[str, Any],
    template: tuple[tuple[str, Any], ...],
) -> None:
    """Talk to BUNDLE, line by line.

    /help says what else can be typed. A turn costs its new tokens: what was computed before is kept. Tokens are chosen
    as the model's authors have it, where no option says otherwise. Answers go to stdout, all else to stderr: it works
    as a pipe too. Nothing is written anywhere but by /save.
    """
    from shutil import get_terminal_size

    from pocketmoe.console.chat import ChatLoop, refuse_without_template
    from pocketmoe.console.lines import open_lines
    from pocketmoe.runtime.conversation import read_conversation
    from pocketmoe.runtime.memory.budget import refuse_over_budget
    from pocketmoe.runtime.model import LoadRequest, Model

    messages = read_conversation(saved) if saved else []
    read = open_lines()
    request = LoadRequest(
        memory, context, threads, "auto", "auto", drop_cold, prefer_cached, prefix_cache=prefix_cache, packed=packed
    )
    if "logit_bias" in sampling:
        sampling["logit_bias"] = dict(sampling["logit_bias"])
    root = find_bundle(bundle)
    refuse_without_template(root)
    with ProgressBar() as bar:
        model = Model(root, request, bar)
    with model:
        conversation = model.chat(system, max_tokens=max_tokens, template=dict(template), **sampling)
        conversation.messages += messages
        ChatLoop(model, conversation, read, get_terminal_size().columns).run()
        found = model.memory
    refuse_over_budget(found["peak"], found["budget"])
