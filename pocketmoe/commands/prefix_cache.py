"""prefix-cache: what a prefix cache on disk holds, and its removal."""

from __future__ import annotations

from pathlib import Path

import click

from pocketmoe.console.numbers import PATH
from pocketmoe.console.options import examples, json_option, print_json


@click.command(
    "prefix-cache", epilog=examples("pocketmoe prefix-cache CACHE", "pocketmoe prefix-cache CACHE --clear --json")
)
@click.argument("directory", type=PATH, metavar="DIR")
@click.option("--list", "listed", is_flag=True, help="Say what is in it, by model. So it does without an option.")
@click.option("--clear", is_flag=True, help="Remove all of it, and DIR if nothing else is there.")
@json_option
def prefix_cache(directory: Path, listed: bool, clear: bool, as_json: bool) -> None:
    """Look at what --prefix-cache keeps in DIR, or remove it.

    It is made of the texts themselves: whoever reads it can tell most of them.
    """
    from pocketmoe.console.tables import prefix_cache_table
    from pocketmoe.runtime.prefix_cache.listing import look

    if listed and clear:
        raise click.UsageError("Choose --list or --clear.")
    found = look(directory, clear)
    if as_json:
        print_json(found)
    else:
        click.echo(prefix_cache_table(found))
