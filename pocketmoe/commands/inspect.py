"""inspect: what is in a bundle."""

from __future__ import annotations

import click

from pocketmoe.console.options import bundle_argument, examples, find_bundle, json_option, print_json


@click.command(epilog=examples("pocketmoe inspect SMALL", "pocketmoe inspect SMALL --json"))
@bundle_argument
@json_option
def inspect(bundle: str, as_json: bool) -> None:
    """Say what is in BUNDLE.

    Architecture, experts, bytes by class, schemes, provenance.
    """
    from pocketmoe.bundle.inspection import inspect_bundle
    from pocketmoe.bundle.reader import Bundle
    from pocketmoe.console.tables import inspection_table

    inspection = inspect_bundle(Bundle.open(find_bundle(bundle)))
    if as_json:
        print_json(inspection)
    else:
        click.echo(inspection_table(inspection))
