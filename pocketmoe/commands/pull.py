"""pull: a bundle from the hub."""

from __future__ import annotations

from pathlib import Path

import click

from pocketmoe.console.numbers import PATH
from pocketmoe.console.options import examples
from pocketmoe.console.progress import ProgressBar


@click.command(
    epilog=examples(
        "pocketmoe pull someone/olmoe-int4",
        "pocketmoe pull someone/olmoe-int4@v1 -o SMALL",
    )
)
@click.argument("bundle", metavar="ORG/NAME[@REVISION]")
@click.option("-o", "--output", type=PATH, metavar="DIR", help="Where it goes. Default: the hub's cache (HF_HOME).")
def pull(bundle: str, output: Path | None) -> None:
    """Download a bundle from the Hugging Face hub.

    REVISION is a branch, tag or commit. Only files that the bundle's manifest names are downloaded, and every byte is
    checked against it; the directory is printed. What was broken off is gone on with by the same command. Every command
    that takes a BUNDLE takes ORG/NAME too, and downloads it into the hub's cache where it is not there.
    """
    from pocketmoe.errors import BadInput
    from pocketmoe.hub.client import Reference
    from pocketmoe.hub.pull import pull as pull_bundle
    from pocketmoe.hub.pull import pull_to

    reference = Reference.parse(bundle)
    if reference is None:
        raise BadInput(f"{bundle} is no hub id", "Name a repository of the hub: ORG/NAME or ORG/NAME@REVISION.")
    with ProgressBar() as bar:
        if output is None:
            root = pull_bundle(reference, progress=bar, check=True)
        else:
            root = pull_to(reference, output, progress=bar).root
    click.echo(root)
