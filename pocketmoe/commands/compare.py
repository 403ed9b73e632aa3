"""What it costs elsewhere: compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pocketmoe.console.numbers import PART, PATH, Number, Users, Whole
from pocketmoe.console.options import json_option, print_json
from pocketmoe.console.progress import ProgressBar

if TYPE_CHECKING:
    import datetime

    from pocketmoe.profiles.compare.cost import Assumptions
    from pocketmoe.profiles.compare.endpoint import Measurement
    from pocketmoe.profiles.profile import Profile

_AMOUNT = Number(0, 1e9)
_WATTS = Number(1e-3, 1e6)


def _assumption_options(command: Any) -> Any:
    """An option for each assumption of the cost model, with its default."""
    options = [
        ("--device", str, None, "Price and power of a device that devices.toml knows, where they are not given."),
        ("--device-price", _AMOUNT, None, "USD. [default: 600]"),
        ("--resale", _AMOUNT, 0.0, "USD that the device brings at the end."),
        ("--years", Number(0.01, 1000), 3.0, "How long the device is used."),
        ("--utilisation", PART, 0.25, "Share of the time in which the device makes tokens."),
        ("--cloud-utilisation", PART, 1.0, "Share of the hours paid in which a rented GPU makes tokens."),
        ("--usd-per-kwh", _AMOUNT, 0.15, "Price of electricity."),
        ("--load-watts", _WATTS, None, "Where not measured. [default: 45]"),
        ("--idle-watts", Number(0, 1e6), None, "Of the device, all day. [default: 8]"),
        ("--users", Whole(2, 100_000), 64, "At once on a GPU that is kept busy, as far as its memory goes."),
    ]
    for name, kind, default, text in reversed(options):
        shown = default is not None
        command = click.option(name, type=kind, default=default, show_default=shown, help=text)(command)
    return command


def _endpoint_options(command: Any) -> Any:
    """Options of the measurement of a server."""
    options = [
        click.option("--endpoint", metavar="URL", help="Measure this OpenAI-compatible server under the same work."),
        click.option("--model", metavar="NAME", help="What the server calls the model; also for --write-sky."),
        click.option("--api", type=click.Choice(["completions", "chat"]), default="completions", show_default=True),
        click.option("--api-key-file", type=PATH, help="A file with the key, never shown."),
        click.option("--concurrency", type=Users(), default="1,8", show_default=True, help="Users at once, by level."),
        click.option("--requests", type=Whole(1, 100), default=4, show_default=True, help="At each level."),
        click.option("--timeout", type=Number(0.1, 86_400), default=120.0, show_default=True, help="Seconds."),
        click.option("--measurement", type=PATH, help="An endpoint.json of an earlier run, instead."),
        click.option("--instance", metavar="PROVIDER/NAME", help="What the server runs on, for its price."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("profile", type=PATH)
@click.option("-o", "--output", type=PATH, help="A directory for compare.json and compare.html.")
@click.option("--cloud", multiple=True, metavar="NAME", help="Only this provider, instance, GPU or model; repeatable.")
@click.option("--prices", type=PATH, help="A file in the form of clouds.toml, over the built-in.")
@_endpoint_options
@_assumption_options
@click.option("--write-sky", type=PATH, help="A SkyPilot task that serves this model.")
@click.option("--gpu", default="L4", show_default=True, help="For --write-sky.")
@json_option
def compare(profile: Path, output: Path | None, write_sky: Path | None, as_json: bool, **options: Any) -> None:
    """Compare PROFILE, a profile.json, with rented GPUs and hosted APIs: cost, latency, energy, and from where it pays.

    Each figure says whether it was measured, published or predicted. Usually an API is cheaper; it says so where it is.
    """
    import datetime

    from pocketmoe.console.tables import comparison_table
    from pocketmoe.profiles.compare import comparing
    from pocketmoe.profiles.compare.compare import compare as run
    from pocketmoe.profiles.compare.records import Request
    from pocketmoe.profiles.profile import read_profile

    if output is None and write_sky is None and not as_json:
        raise click.UsageError("Give -o DIR, --write-sky FILE or --json.")
    found, now = read_profile(profile), datetime.datetime.now(datetime.UTC)
    prices, warnings, skipped = comparing.gather_prices(
        options["prices"], options["cloud"], Path.home() / ".sky" / "catalogs", now.date()
    )
    model = options["model"] or ""
    if write_sky is not None:
        click.echo(comparing.write_task(write_sky, found, prices, options["gpu"], model), err=True)
        if output is None and not as_json:
            return
    comparison = run(
        Request(
            profile=found,
            prices=prices,
            assumptions=_assumptions(options),
            created=now.isoformat(timespec="seconds"),
            model=model,
            measurement=_measurement(found, output, now, options),
            instance=prices.find_instance(options["instance"]) if options["instance"] else None,
            warnings=warnings,
            skipped=skipped,
        )
    )
    if output is not None:
        comparing.write_comparison(output, comparison)
        click.echo(f"Wrote {output}/{comparing.COMPARISON} and {comparing.PAGE}.", err=True)
    if as_json:
        print_json(comparison)
    else:
        click.echo(comparison_table(comparison))


def _measurement(
    profile: Profile, output: Path | None, now: datetime.datetime, options: dict[str, Any]
) -> Measurement | None:
    from pocketmoe.profiles.compare import comparing
    from pocketmoe.profiles.compare.endpoint import Target

    if options["endpoint"] and options["measurement"]:
        raise click.UsageError("Give --endpoint or --measurement, not both.")
    if options["measurement"]:
        return comparing.read_measurement(options["measurement"])
    if not options["endpoint"]:
        return None
    if not options["model"]:
        raise click.UsageError("--endpoint needs --model NAME, as the server calls it.")
    key = comparing.read_key(options["api_key_file"]) if options["api_key_file"] else ""
    target = Target(options["endpoint"], options["model"], options["api"], key, options["timeout"])
    with ProgressBar() as bar:
        found = comparing.measure_endpoint(profile, target, options["concurrency"], options["requests"], now, bar)
    if output is not None:
        comparing.write_measurement(output, found)
    return found


def _assumptions(options: dict[str, Any]) -> Assumptions:
    """What was given; else what is known of the device named; else the defaults."""
    from pocketmoe.profiles.catalogue.devices import find_device
    from pocketmoe.profiles.compare.cost import Assumptions

    given = {
        name: options[name] for name in ("resale", "years", "utilisation", "cloud_utilisation", "usd_per_kwh", "users")
    }
    given["resale_usd"] = given.pop("resale")
    known = {}
    if options["device"]:
        device = find_device(options["device"])
        known = {
            "device_price_usd": device.price_usd.value,
            "load_watts": device.load_watts.value,
            "idle_watts": device.idle_watts.value,
        }
    own = {"device_price_usd": "device_price", "load_watts": "load_watts", "idle_watts": "idle_watts"}
    known |= {name: options[option] for name, option in own.items() if options[option] is not None}
    if options["resale"] > known.get("device_price_usd", Assumptions.device_price_usd):
        raise click.UsageError("--resale is more than the device's price: give that by --device-price.")
    return Assumptions(
        resale_usd=options["resale"],
        years=options["years"],
        utilisation=options["utilisation"],
        cloud_utilisation=options["cloud_utilisation"],
        usd_per_kwh=options["usd_per_kwh"],
        users=options["users"],
        **known,
    )
