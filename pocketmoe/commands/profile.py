"""profile: a bundle measured on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pocketmoe.console.numbers import BUNDLE, MOST_TOKENS, PATH, SEED, TOKENS, BudgetNames, Rates, Whole
from pocketmoe.console.options import (
    backend_option,
    complete_devices,
    examples,
    find_bundle,
    json_option,
    packed_dir_option,
    threads_option,
)
from pocketmoe.console.progress import ProgressBar

if TYPE_CHECKING:
    from pocketmoe.profiles.estimate.device_prediction import DevicePrediction
    from pocketmoe.profiles.profile import Profile


@click.command(
    epilog=examples(
        "pocketmoe profile SMALL -o profiles/small",
        "pocketmoe profile SMALL -o profiles/small --memory least,1GB,50%",
        "pocketmoe profile profiles/small --predict pi5-8gb",
    )
)
@click.argument("bundle", metavar="BUNDLE|PROFILE", type=BUNDLE)
@click.option("-o", "--output", type=PATH, help="A directory for profile.json and report.html.")
@click.option(
    "--memory",
    type=BudgetNames(),
    metavar="LIST",
    default="least,25%,50%,75%,100%",
    show_default=True,
    help="Budgets: the least possible, room for a share of the experts, or sizes of the whole process.",
)
@click.option("--prompt-tokens", type=TOKENS, default=128, show_default=True)
@click.option("--output-tokens", type=Whole(3, MOST_TOKENS), default=64, show_default=True)
@click.option("--text", type=PATH, help="A file whose first tokens are the prompt.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of prompt and samples.")
@threads_option
@backend_option
@click.option(
    "--prefetch", type=click.Choice(["auto", "on", "off"], case_sensitive=False), default="auto", show_default=True
)
@click.option(
    "--slow-disk",
    "slow_disks",
    type=Rates(),
    default=(),
    metavar="LIST",
    help="Measure again with expert reads slowed to so many bytes per second, 500MB,200MB, to test predictions.",
)
@click.option(
    "--repeats",
    type=Whole(0, 100),
    default=1,
    show_default=True,
    metavar="N",
    help="How often to measure a budget again while others keep the machine busy; the quietest is kept.",
)
@click.option(
    "--predict",
    metavar="DEVICE",
    multiple=True,
    shell_complete=complete_devices,
    help="Say what the model would do there; may be repeated.",
)
@packed_dir_option
@click.option("--devices", type=PATH, metavar="FILE", help="More devices, in the form of devices.toml (docs/PLAN.md).")
@json_option
def profile(
    bundle: str, output: Path | None, predict: tuple[str, ...], devices: Path | None, as_json: bool, **options: Any
) -> None:
    """Measure memory against latency on this machine.

    BUNDLE runs at some budgets, which become profile.json and report.html. The prompt is of random tokens, or of
    --text. A killed profile goes on where it was, and budgets can be added to one. With --predict a PROFILE, the
    directory of an earlier one, will do too: nothing is measured then.
    """
    from pocketmoe.profiles.catalogue.devices import find_device, known_devices, read_devices
    from pocketmoe.profiles.estimate import device_prediction
    from pocketmoe.profiles.measure.measure import ProfileRequest, profile_bundle
    from pocketmoe.profiles.profile import REPORT, is_profile, read_profile
    from pocketmoe.profiles.report.page import write_report

    known = known_devices() | (read_devices(devices) if devices else {})
    chosen = {name: find_device(name, known) for name in predict}
    if is_profile(Path(bundle)):
        found, folder = read_profile(Path(bundle)), output
    elif output is None:
        raise click.UsageError("Missing option '-o': a directory for profile.json and report.html.")
    else:
        root = find_bundle(bundle)
        with ProgressBar() as bar:
            found, folder = profile_bundle(ProfileRequest(root, **options), output, bar), output
    predictions = [device_prediction.predict_device(found, name, device) for name, device in chosen.items()]
    if folder is not None:
        write_report(folder / REPORT, found, predictions)
    _say(found, predictions, folder, as_json)


def _say(found: Profile, predictions: Sequence[DevicePrediction], folder: Path | None, as_json: bool) -> None:
    from pocketmoe.profiles.profile import REPORT
    from pocketmoe.profiles.report.tables import prediction_table, predictions_json, profile_table

    if as_json:
        import msgspec

        click.echo(msgspec.json.encode(predictions_json(found, predictions) if predictions else found))
        return
    click.echo(profile_table(found))
    for prediction in predictions:
        click.echo(f"\n{prediction_table(prediction)}")
    if folder is not None:
        click.echo(f"Wrote {folder / REPORT}.", err=True)
