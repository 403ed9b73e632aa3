"""Around a comparison: prices gathered, costs assumed, an endpoint measured or its record read, records written."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from pocketmoe.bundle.files import read_text, read_whole, write_whole
from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.errors import BadInput, DamagedFile
from pocketmoe.profiles.catalogue import clouds, sky
from pocketmoe.profiles.catalogue.clouds import Prices
from pocketmoe.profiles.catalogue.devices import find_device, known_devices
from pocketmoe.profiles.catalogue.sourced_value import STALE_AFTER_DAYS, stale
from pocketmoe.profiles.compare import endpoint
from pocketmoe.profiles.compare.cost import Assumptions
from pocketmoe.profiles.compare.endpoint import Measurement, Target
from pocketmoe.profiles.compare.records import Comparison
from pocketmoe.profiles.compare.subject import Subject, read_plan, subject_of_profile
from pocketmoe.profiles.estimate.roofline import fit_gpus
from pocketmoe.profiles.profile import read_profile

COMPARISON, MEASUREMENT = "compare.json", "endpoint.json"
_MAX_RECORD_BYTES = 1 << 20
_MAX_KEY_BYTES = 4096


def gather_prices(
    own: Path | None, chosen: Sequence[str], catalogue: Path, today: datetime.date
) -> tuple[Prices, tuple[str, ...], tuple[str, ...]]:
    """Prices of the clouds chosen, all for none; warnings; what was left out.

    The user's rows go over SkyPilot's, and these over the built-in. Raises BadInput.
    """
    built_in = clouds.read_prices()
    found, said = sky.read_catalogue(catalogue)
    merged = clouds.merge(built_in, Prices(instance=found))
    if own is not None:
        merged = clouds.merge(merged, clouds.read_own(own, merged))
    prices = clouds.choose(merged, chosen)
    old = stale(prices.rows(), today)
    warnings: list[str] = []
    if old:
        oldest = min(row.as_of for row in old)
        warnings.append(
            f"{len(old)} rows of prices and data are more than {STALE_AFTER_DAYS} days old, the oldest of {oldest}: "
            "look them up before you decide by them, and give yours with --prices"
        )
    unverified = sum(row.confidence == "M" for row in prices.rows())
    if unverified:
        warnings.append(f"{unverified} rows are unverified (confidence M)")
    return prices, tuple(warnings), () if found else (said,)


def read_subject(profile: Path | None, plan: Path | None) -> Subject:
    """What is compared, of the file that there is. Raises BadInput, DamagedFile."""
    if profile is not None:
        return subject_of_profile(read_profile(profile))
    assert plan is not None, "one of both is given"
    return read_plan(plan)


def assume(device: str | None, subject: Subject | None = None, **given: float | None) -> Assumptions:
    """What was given; else what is known of the device named, or planned for; else the defaults.

    A GPU works as much of its hours as the device where nothing else is given. Raises BadInput for an unknown device,
    ValueError for amounts that do not go together.
    """
    own = {name: value for name, value in given.items() if value is not None}
    own.setdefault("cloud_utilisation", own.get("utilisation", Assumptions.utilisation))
    if device is None and subject is not None and subject.catalogue in known_devices():
        device = subject.catalogue
    if device:
        found = find_device(device)
        known = {name: getattr(found, name).value for name in ("load_watts", "idle_watts")}
        own = {"device_price_usd": found.price_usd.value, **known, **own}
    assumptions = replace(Assumptions(), **own)
    if assumptions.resale_usd > assumptions.device_price_usd:
        raise ValueError("--resale is more than the device's price: give that by --device-price.")
    return assumptions


def write_task(path: Path, subject: Subject, prices: Prices, gpu_name: str, model: str) -> str:
    """Write a SkyPilot task that serves the model; what to type next. Raises BadInput, OutputError."""
    gpu = prices.find_gpu(gpu_name)
    name = model or subject.model
    work = subject.work
    context = work.prompt_tokens + work.output_tokens
    fit = fit_gpus(subject.served, gpu, 8, context)
    if fit is None or fit[0] < 16:
        fit = (16, 8)
    text = sky.task(name, gpu, fit[1], max(1024, 2 * context))
    write_whole(path, text.encode())
    return sky.how_to_measure(path, name)


def read_key(path: Path) -> str:
    """An API key: the first line of a file. Raises BadInput, which never shows it."""
    text = read_text(path, "Give a text file with the key as its first line.", _MAX_KEY_BYTES)
    key = text.strip().splitlines()[0].strip() if text.strip() else ""
    if not key or not key.isascii() or not key.isprintable():
        raise BadInput(f"{path} holds no key", "Give a text file with the key as its first line.")
    return key


def measure_endpoint(
    subject: Subject,
    target: Target,
    users: tuple[int, ...],
    requests: int,
    now: datetime.datetime,
    progress: Progress = no_progress,
) -> Measurement:
    """The same lengths of prompt and answer, at each number of users. Raises BadInput."""
    work = subject.work
    test = endpoint.LoadTest(work.prompt_tokens, work.output_tokens, users, requests)
    return endpoint.measure(target, test, now.isoformat(timespec="seconds"), progress)


def read_measurement(path: Path) -> Measurement:
    """The endpoint.json of an earlier run. Raises BadInput or DamagedFile."""
    data = read_whole(path, _MAX_RECORD_BYTES, "Make one: compare --endpoint URL -o DIR.")
    try:
        found = msgspec.json.decode(data, type=Measurement)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedFile(path, f"is no measurement ({error})", "Measure the endpoint again.") from error
    if found.format != endpoint.FORMAT or not found.levels:
        raise DamagedFile(path, "is of another format, or empty", "Measure the endpoint again.")
    if any(level.users < 1 or min(level.tokens_per_s, level.tokens_per_s_per_user) <= 0 for level in found.levels):
        raise DamagedFile(path, "has rates that cannot be", "Measure the endpoint again.")
    if not all(text.isprintable() for text in (found.url, found.model, found.measured_at, *found.notes)):
        raise DamagedFile(path, "holds control characters, which could steer a terminal", "Measure the endpoint again.")
    return found


def write_measurement(directory: Path, measurement: Measurement) -> None:
    """Before anything else is made of it: a rented server may be gone by then. Raises OutputError."""
    write_whole(directory / MEASUREMENT, msgspec.json.format(msgspec.json.encode(measurement), indent=1))


def write_comparison(path: Path, comparison: Comparison) -> None:
    """The record, as JSON. Raises OutputError."""
    write_whole(path, msgspec.json.format(msgspec.json.encode(comparison), indent=1))
