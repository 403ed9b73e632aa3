"""The commands `profile` and, for its processes, the hidden `measure`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pocketmoe.console import ProgressBar


def _memory_list(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[str, ...]:
    from pocketmoe.profiles.measure import check_memory

    texts = tuple(text.strip() for text in value.split(","))
    try:
        for text in texts:
            check_memory(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    return texts


def _rates(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[float, ...]:
    from pocketmoe.runtime.budget import parse_size

    try:
        rates = tuple(float(parse_size(text)) for text in value.split(",")) if value else ()
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    if 0 in rates:
        raise click.BadParameter("a disk that reads nothing would take for ever")
    return rates


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="A directory for the two files.")
@click.option(
    "--memory",
    metavar="LIST",
    default="least,25%,50%,75%,100%",
    show_default=True,
    callback=_memory_list,
    help="Budgets: the least possible, room for a share of the experts, or sizes of the whole process.",
)
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--output-tokens", type=click.IntRange(min=3), default=64, show_default=True)
@click.option("--text", type=click.Path(path_type=Path), help="A file whose first tokens are the prompt.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of prompt and samples.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: one per physical core.")
@click.option("--backend", type=click.Choice(["auto", "slots", "sessions"]), default="auto", show_default=True)
@click.option("--prefetch", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True)
@click.option(
    "--slow-disk",
    metavar="LIST",
    callback=_rates,
    help="Measure again with expert reads slowed to so many bytes per second, 500MB,200MB, to test predictions.",
)
@click.option("--json", "as_json", is_flag=True, help="Print profile.json on stdout and nothing else there.")
def profile(bundle: Path, output: Path, as_json: bool, text: Path | None, **options: Any) -> None:
    """Measure BUNDLE on this machine at some budgets: latency against memory, as profile.json and report.html.

    The prompt is of random tokens, or of --text. A killed profile goes on where it was; budgets can be added to one.
    """
    from pocketmoe.profiles.measure import ProfileRequest, profile_bundle

    request = ProfileRequest(bundle=bundle, text=text, slow_disks=options.pop("slow_disk"), **options)
    with ProgressBar() as bar:
        found = profile_bundle(request, output, bar)
    if as_json:
        import msgspec

        click.echo(msgspec.json.encode(found))


@click.command(hidden=True)
@click.argument("order")
def measure(order: str) -> None:
    """Do one part of a profile: ORDER is JSON, and so is the answer. Progress goes to stderr, a line each."""
    import msgspec

    from pocketmoe.profiles import worker

    def tell(what: str, done: int, total: int) -> None:
        click.echo(json.dumps([what, done, total]), err=True)

    found = msgspec.json.decode(order, type=worker.Order)
    is_survey = found.memory_bytes is None and found.expert_share is None
    task = worker.survey if is_survey else worker.measure
    click.echo(msgspec.json.encode(task(found, tell)))
