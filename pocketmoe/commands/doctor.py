"""doctor: this machine."""

from __future__ import annotations

from pathlib import Path

import click

from pocketmoe.console.options import examples, json_option, print_json
from pocketmoe.console.progress import ProgressBar


@click.command(epilog=examples("pocketmoe doctor", "pocketmoe doctor --json"))
@json_option
def doctor(as_json: bool) -> None:
    """Look at this machine.

    CPU, memory, disk speed, limits, and whether expert slots work on it.
    """
    from pocketmoe.console.tables import doctor_table
    from pocketmoe.profiles.machine.doctor import advice, examine
    from pocketmoe.runtime.run import default_threads

    with ProgressBar() as bar:
        report = examine(Path(), bar, threads=[default_threads()])
    if as_json:
        print_json(report)
    else:
        click.echo(doctor_table(report, advice(report)))
