"""What there is: inspect, verify, doctor."""

from __future__ import annotations

from pathlib import Path

import click

from pocketmoe.console.options import bundle_argument, json_option, print_json
from pocketmoe.console.progress import ProgressBar
from pocketmoe.errors import BadInput


@click.command()
@bundle_argument
@json_option
def inspect(bundle: Path, as_json: bool) -> None:
    """Say what is in BUNDLE: architecture, experts, bytes by class, schemes, provenance."""
    from pocketmoe.bundle.inspection import inspect_bundle
    from pocketmoe.bundle.reader import Bundle
    from pocketmoe.console.tables import inspection_table

    inspection = inspect_bundle(Bundle.open(bundle))
    if as_json:
        print_json(inspection)
    else:
        click.echo(inspection_table(inspection))


@click.command()
@bundle_argument
def verify(bundle: Path) -> None:
    """Check every hash of BUNDLE, and that its tokenizer and graphs load; exit 0, or list what is wrong and exit 3."""
    from pocketmoe.bundle.reader import Bundle
    from pocketmoe.runtime.verification import verify as verify_bundle

    with ProgressBar() as bar:
        opened = Bundle.open(bundle)
        damages = list(verify_bundle(opened, bar))
    for damage in damages:
        click.echo(damage)
    if damages:
        raise BadInput(f"{bundle} is damaged in {len(damages)} places", "Export or copy it again.")
    click.echo(f"{len(opened.manifest.files) + 1} files, every hash matches, and its graphs load.")


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Look at this machine: CPU, memory, disk speed, limits, and whether expert slots work on it."""
    from pocketmoe.console.tables import doctor_table
    from pocketmoe.profiles.machine.doctor import advice, examine

    with ProgressBar() as bar:
        report = examine(Path(), bar)
    if as_json:
        print_json(report)
    else:
        click.echo(doctor_table(report, advice(report)))
