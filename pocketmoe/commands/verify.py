"""verify: every hash of a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pocketmoe.console.options import bundle_argument, examples, find_bundle, packed_dir_option
from pocketmoe.console.progress import ProgressBar
from pocketmoe.errors import BadInput

if TYPE_CHECKING:
    from pocketmoe.bundle.packed import PackedPlace


@click.command(epilog=examples("pocketmoe verify SMALL"))
@bundle_argument
@packed_dir_option
def verify(bundle: str, packed: PackedPlace | None) -> None:
    """Check every hash of BUNDLE.

    And that its tokenizer and graphs load; exit 0, or list what is wrong and exit 3.
    """
    from pocketmoe.bundle.reader import Bundle
    from pocketmoe.runtime.verification import verify as verify_bundle

    root = find_bundle(bundle)
    with ProgressBar() as bar:
        opened = Bundle.open(root, packed)
        damages = list(verify_bundle(opened, bar))
    for damage in damages:
        click.echo(damage)
    if damages:
        raise BadInput(f"{bundle} is damaged in {len(damages)} places", "Export or copy it again.")
    click.echo(f"{len(opened.manifest.files) + 1} files, every hash matches, and its graphs load.")
