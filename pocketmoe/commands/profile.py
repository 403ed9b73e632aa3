"""What a model does on this machine, measured: profile, and what each of its processes does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pocketmoe.console.numbers import MOST_TOKENS, PATH, SEED, TOKENS, BudgetNames, Rates, Whole
from pocketmoe.console.options import json_option, threads_option
from pocketmoe.console.progress import ProgressBar

if TYPE_CHECKING:
    from pocketmoe.profiles.profile import Profile


@click.command()
@click.argument("bundle", metavar="BUNDLE|PROFILE", type=PATH)
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
@click.option("--backend", type=click.Choice(["auto", "slots", "sessions"]), default="auto", show_default=True)
@click.option("--prefetch", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True)
@click.option(
    "--slow-disk",
    type=Rates(),
    metavar="LIST",
    help="Measure again with expert reads slowed to so many bytes per second, 500MB,200MB, to test predictions.",
)
@click.option("--predict", metavar="DEVICE", multiple=True, help="Say what the model would do there; may be repeated.")
@json_option
def profile(
    bundle: Path, output: Path | None, text: Path | None, predict: tuple[str, ...], as_json: bool, **options: Any
) -> None:
    """Measure BUNDLE on this machine at some budgets: memory against latency, as profile.json and report.html.

    The prompt is of random tokens, or of --text. A killed profile goes on where it was, and budgets can be added to
    one. With --predict a PROFILE, the directory of an earlier one, will do too: nothing is measured then.
    """
    from pocketmoe.profiles.catalogue.devices import find_device
    from pocketmoe.profiles.estimate import elsewhere
    from pocketmoe.profiles.measure.measure import ProfileRequest, profile_bundle
    from pocketmoe.profiles.profile import REPORT, is_profile, read_profile
    from pocketmoe.profiles.report.page import write_report

    devices = {name: find_device(name) for name in predict}
    if is_profile(bundle):
        found, folder = read_profile(bundle), output
    elif output is None:
        raise click.UsageError("Missing option '-o': a directory for profile.json and report.html.")
    else:
        request = ProfileRequest(bundle=bundle, text=text, slow_disks=options.pop("slow_disk") or (), **options)
        with ProgressBar() as bar:
            found, folder = profile_bundle(request, output, bar), output
    predictions = [elsewhere.predict_device(found, name, device) for name, device in devices.items()]
    if folder is not None:
        write_report(folder / REPORT, found, predictions)
    _say(found, predictions, folder, as_json)


def _say(found: Profile, predictions: list[Any], folder: Path | None, as_json: bool) -> None:
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


@click.command(hidden=True)
@click.argument("order")
def measure(order: str) -> None:
    """Do one part of a profile: ORDER is JSON, and so is the answer. Progress goes to stderr, a line each."""
    import msgspec

    from pocketmoe.profiles.measure import worker
    from pocketmoe.runtime.memory.budget import refuse_over_budget

    def tell(what: str, done: int, total: int) -> None:
        click.echo(json.dumps([what, done, total]), err=True)

    try:
        found = msgspec.json.decode(order, type=worker.Order)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise click.BadParameter(f"{error}", param_hint="'ORDER'") from error
    is_survey = found.memory_bytes is None and found.expert_share is None
    answer = worker.survey(found, tell) if is_survey else worker.measure(found, tell)
    click.echo(msgspec.json.encode(answer))
    if isinstance(answer, worker.Measured):
        refuse_over_budget(answer.run.peak_memory_bytes, answer.run.memory_budget_bytes)
