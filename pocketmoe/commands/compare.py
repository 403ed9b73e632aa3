"""compare: a profile beside rented GPUs and hosted APIs."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pocketmoe.console.numbers import PART, PATH, Number, Users, Whole
from pocketmoe.console.options import complete_devices, examples, gathered, json_option, print_json, usage
from pocketmoe.console.progress import ProgressBar

if TYPE_CHECKING:
    from pocketmoe.profiles.compare.endpoint import Api, Measurement
    from pocketmoe.profiles.compare.records import Comparison
    from pocketmoe.profiles.compare.subject import Subject

_AMOUNT = Number(0, 1e9)
_WATTS = Number(1e-3, 1e6)


def _assumption(name: str, kind: Whole | Number, default: float | None, text: str, field: str = "") -> Any:
    field = field or name.removeprefix("--").replace("-", "_")
    return click.option(name, field, type=kind, default=default, show_default=default is not None, help=text)


_assumption_options = gathered(
    "assumed",
    dict,
    click.option(
        "--device",
        shell_complete=complete_devices,
        help="Price and power of a device that devices.toml knows, where they are not given.",
    ),
    _assumption("--device-price", _AMOUNT, None, "USD. [default: 600]", "device_price_usd"),
    _assumption("--resale", _AMOUNT, 0.0, "USD that the device brings at the end.", "resale_usd"),
    _assumption("--years", Number(0.01, 1000), 3.0, "How long the device is used."),
    _assumption("--utilisation", PART, 0.25, "Share of the time in which the device makes tokens."),
    _assumption(
        "--cloud-utilisation",
        PART,
        None,
        "Share of the hours paid in which a rented GPU makes tokens. [default: as the device]",
    ),
    _assumption("--usd-per-kwh", _AMOUNT, 0.15, "Price of electricity."),
    _assumption("--load-watts", _WATTS, None, "Where not measured. [default: 45]"),
    _assumption("--idle-watts", Number(0, 1e6), None, "Of the device, all day. [default: 8]"),
    _assumption("--users", Whole(2, 100_000), 64, "At once on a GPU that is kept busy, as far as its memory goes."),
)


@dataclass(frozen=True)
class Server:
    """What is to be measured beside, and how; or what was."""

    endpoint: str | None
    model: str | None
    api: Api
    api_key_file: Path | None
    concurrency: tuple[int, ...]
    requests: int
    timeout: float
    measurement: Path | None
    instance: str | None


_server_options = gathered(
    "server",
    Server,
    click.option("--endpoint", metavar="URL", help="Measure this OpenAI-compatible server under the same work."),
    click.option("--model", metavar="NAME", help="The model as the server calls it; also for --write-sky."),
    click.option(
        "--api",
        type=click.Choice(["completions", "chat"], case_sensitive=False),
        default="completions",
        show_default=True,
    ),
    click.option("--api-key-file", type=PATH, help="A file with the key, never shown."),
    click.option("--concurrency", type=Users(), default="1,8", show_default=True, help="Users at once, by level."),
    click.option("--requests", type=Whole(1, 100), default=4, show_default=True, help="At each level."),
    click.option("--timeout", type=Number(0.1, 86_400), default=120.0, show_default=True, help="Seconds."),
    click.option("--measurement", type=PATH, help="An endpoint.json of an earlier run, instead."),
    click.option("--instance", metavar="PROVIDER/NAME", help="What the server runs on, for its price."),
)


@click.command(
    short_help="Say whether a device pays against cloud and APIs.",
    epilog=examples(
        "pocketmoe compare profiles/small -o profiles/small",
        "pocketmoe compare --plan PLAN.json -o DIR",
        "pocketmoe compare profiles/small -o DIR --cloud aws --device orin-nano-8gb --utilisation 0.5",
        "pocketmoe compare profiles/small -o DIR --endpoint http://127.0.0.1:8000 --model allenai/OLMoE-1B-7B-0924",
    ),
)
@click.argument("profile", required=False, type=PATH)
@click.option("--plan", type=PATH, metavar="FILE", help="The JSON of `plan --json` instead: before there is a device.")
@click.option("-o", "--output", type=PATH, help="A directory for compare.json and compare.html.")
@click.option("--cloud", multiple=True, metavar="NAME", help="Only this provider, instance, GPU or model; repeatable.")
@click.option("--known-as", metavar="NAME", help="What sellers call the model, where its source does not say.")
@click.option("--prices", type=PATH, help="A file in the form of clouds.toml, over the built-in.")
@_server_options
@_assumption_options
@click.option("--write-sky", type=PATH, help="A SkyPilot task that serves this model.")
@click.option("--gpu", default="L4", show_default=True, help="For --write-sky.")
@json_option
def compare(
    profile: Path | None,
    plan: Path | None,
    output: Path | None,
    cloud: tuple[str, ...],
    known_as: str | None,
    prices: Path | None,
    server: Server,
    assumed: dict[str, Any],
    write_sky: Path | None,
    gpu: str,
    as_json: bool,
) -> None:
    """Compare a profile, or a plan, with rented GPUs and hosted APIs.

    PROFILE is a profile.json, or its directory. Cost, latency, energy, and from where on the device pays; each figure
    says whether it was measured, published or predicted. Usually an API is cheaper; it says so where it is.
    """
    from pocketmoe.profiles.compare import comparing
    from pocketmoe.profiles.compare.compare import compare as run
    from pocketmoe.profiles.compare.records import Request

    if (profile is None) == (plan is None):
        raise click.UsageError("Give PROFILE, or --plan FILE, one of both.")
    if output is None and write_sky is None and not as_json:
        raise click.UsageError("Give -o DIR, --write-sky FILE or --json.")
    found, now = comparing.read_subject(profile, plan), datetime.datetime.now(datetime.UTC)
    offered, warnings, skipped = comparing.gather_prices(prices, cloud, _catalogue(), now.date())
    if write_sky is not None:
        name = server.model or known_as or ""
        click.echo(comparing.write_task(write_sky, found, offered, gpu, name), err=True)
        if output is None and not as_json:
            return
    with usage():
        given = comparing.assume(subject=found, **assumed)
    instance = offered.find_instance(server.instance) if server.instance else None
    measured, created = _measurement(found, output, now, server), now.isoformat(timespec="seconds")
    request = Request(found, offered, given, created, known_as or "", measured, instance, warnings, skipped)
    _show(run(request), output, as_json)


def _catalogue() -> Path:
    return Path.home() / ".sky" / "catalogs"


def _show(comparison: Comparison, output: Path | None, as_json: bool) -> None:
    from pocketmoe.console.tables import comparison_table

    if output is not None:
        _write(output, comparison)
    if as_json:
        print_json(comparison)
    else:
        click.echo(comparison_table(comparison))


def _write(output: Path, comparison: Comparison) -> None:
    from pocketmoe.profiles.compare.comparing import COMPARISON, write_comparison
    from pocketmoe.profiles.compare.page import PAGE, write_page

    write_comparison(output / COMPARISON, comparison)
    write_page(output / PAGE, comparison)
    click.echo(f"Wrote {output}/{COMPARISON} and {PAGE}.", err=True)


def _measurement(subject: Subject, output: Path | None, now: datetime.datetime, server: Server) -> Measurement | None:
    """The server's, measured now or earlier; noted at once, since a rented server may be gone soon."""
    from pocketmoe.profiles.compare import comparing
    from pocketmoe.profiles.compare.endpoint import Target

    if server.endpoint and server.measurement:
        raise click.UsageError("Give --endpoint or --measurement, not both.")
    if server.measurement:
        return comparing.read_measurement(server.measurement)
    if not server.endpoint:
        return None
    if not server.model:
        raise click.UsageError("--endpoint needs --model NAME, as the server calls it.")
    key = comparing.read_key(server.api_key_file) if server.api_key_file else ""
    target = Target(server.endpoint, server.model, server.api, key, server.timeout)
    with ProgressBar() as bar:
        found = comparing.measure_endpoint(subject, target, server.concurrency, server.requests, now, bar)
    if output is not None:
        comparing.write_measurement(output, found)
    return found
