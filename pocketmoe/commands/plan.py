"""plan: what would fit."""

from __future__ import annotations

from pathlib import Path

import click

from pocketmoe.console.numbers import BUNDLE, MOST_TOKENS, PATH, TOKENS, ByteSize, Number, Whole
from pocketmoe.console.options import complete_devices, examples, json_option, print_json
from pocketmoe.console.progress import ProgressBar


@click.command(
    epilog=examples(
        "pocketmoe plan allenai/OLMoE-1B-7B-0924 --device pi5-8gb",
        "pocketmoe plan SMALL --device this --target-tokens-per-s 5",
    )
)
@click.argument("model", metavar="CHECKPOINT|BUNDLE|ORG/NAME", type=BUNDLE)
@click.option(
    "--device",
    required=True,
    metavar="NAME",
    shell_complete=complete_devices,
    help="A name in docs/PLAN.md, or `this`, which is measured.",
)
@click.option("--devices", type=PATH, metavar="FILE", help="More devices, in the form of devices.toml (docs/PLAN.md).")
@click.option("--target-tokens-per-s", type=Number(1e-6, 1e6), metavar="N", help="To be reached.")
@click.option("--context", type=Whole(16, MOST_TOKENS), default=2048, show_default=True, help="Longest text in tokens.")
@click.option(
    "--sequences",
    type=Whole(1, 64),
    default=1,
    show_default=True,
    metavar="N",
    help="Texts at once, of that length each.",
)
@click.option("--prompt-tokens", type=TOKENS, default=128, show_default=True)
@click.option(
    "--reserve", type=ByteSize(or_nothing=True), help="Memory for the system and others. Default: 15%, at least 800MB."
)
@json_option
def plan(
    model: str,
    device: str,
    devices: Path | None,
    target_tokens_per_s: float | None,
    context: int,
    sequences: int,
    prompt_tokens: int,
    reserve: int | None,
    as_json: bool,
) -> None:
    """Say which scheme and budget fit a device.

    And at what speed; or what would fit, if none does (exit 4). CHECKPOINT needs no weights: its config.json is enough;
    of ORG/NAME that, or the manifest.json of a bundle, is downloaded. Speeds are predicted.
    """
    from importlib.util import find_spec

    from pocketmoe.console.plan_table import plan_table
    from pocketmoe.profiles.plan.advice import nothing_fits
    from pocketmoe.profiles.plan.planning import PlanRequest, make_plan

    path, name = _description_of(model)
    request = PlanRequest(path, device, target_tokens_per_s, context, prompt_tokens, reserve, devices, name, sequences)
    with ProgressBar() as bar:
        report = make_plan(request, _count if find_spec("transformers") and find_spec("torch") else None, bar)
    if as_json:
        print_json(report)
    else:
        click.echo(plan_table(report))
    if report.recommended is None:
        raise nothing_fits(report)


def _description_of(model: str) -> tuple[Path, str | None]:
    """Where the model is, or what says what it is; and its name where that is a hub id."""
    from importlib.util import find_spec

    from pocketmoe.hub.pull import find_description, reference_of

    reference = reference_of(model)
    if reference is None or not find_spec("huggingface_hub"):
        return Path(model), None
    return find_description(reference), str(reference)


def _count(config_json: Path) -> dict[str, int]:
    from pocketmoe.export.checkpoint.counting import count_parameters

    return count_parameters(config_json)
