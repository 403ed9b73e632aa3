"""packed: experts that are packed outside of their bundles, and their removal."""

from __future__ import annotations

from pathlib import Path

import click

from pocketmoe.console.numbers import PATH
from pocketmoe.console.options import examples, json_option, packed_place, print_json


@click.command(epilog=examples("pocketmoe packed", "pocketmoe packed --clear", "pocketmoe packed DIR --json"))
@click.argument("directory", required=False, type=PATH, metavar="[DIR]")
@click.option("--clear", is_flag=True, help="Remove all of it, and leave what is not from packing.")
@json_option
def packed(directory: Path | None, clear: bool, as_json: bool) -> None:
    """List the experts that are packed outside of their bundles, or remove them.

    DIR: a --packed-dir. Default: $XDG_CACHE_HOME/pocketmoe/packed, where those of bundles are that cannot be written.
    Whatever is removed, the next run packs again.
    """
    from pocketmoe.bundle.packed import look
    from pocketmoe.console.tables import packed_table

    place = packed_place(directory)
    if place is None:
        raise click.UsageError("There is no home directory: name DIR.")
    found = look(place.directory, clear)
    if as_json:
        print_json(found)
    else:
        click.echo(packed_table(found))
