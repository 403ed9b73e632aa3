"""SkyPilot: prices from its catalogue where it is installed, and a task that serves the same model to be measured."""

from __future__ import annotations

import csv
import datetime
import re
from collections.abc import Iterator
from pathlib import Path

from pocketmoe.errors import BadInput, printable
from pocketmoe.profiles.catalogue.clouds import Gpu, Instance
from pocketmoe.profiles.catalogue.sourced_value import Figure

_OUR_NAMES = {
    "T4": "T4",
    "L4": "L4",
    "A10": "A10",
    "A10G": "A10G",
    "L40S": "L40S",
    "A100": "A100-40GB",
    "A100-80GB": "A100-80GB",
    "A100-80GB-SXM": "A100-80GB",
    "H100": "H100",
    "H100-SXM": "H100",
    "H200": "H200",
    "H200-SXM": "H200",
    "B200": "B200",
}
_THEIR_NAMES = {"A100-40GB": "A100", "A100-80GB-PCIe": "A100-80GB", "H100-PCIe": "H100"}
_WITHOUT_GPU = "gcp"  # its rows of machines leave out what the GPU costs
_PORT = 8000
_CLUSTER = "pocketmoe"
_MOST_ROWS = 2_000_000
_MODEL = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def read_catalogue(directory: Path) -> tuple[tuple[Instance, ...], str]:
    """The cheapest region of each instance that has one of our GPUs, and a line on what was read or why nothing was.

    `directory`: SkyPilot's catalogs folder, with a folder for each version and in it `CLOUD/vms.csv`.
    """
    versions = sorted(directory.glob("v*"), key=lambda path: (len(path.name), path.name))
    files = sorted(versions[-1].glob("*/vms.csv")) if versions else []
    if not files:
        return (), f"SkyPilot's catalogue is not there ({directory}), so its prices were skipped"
    found: dict[tuple[str, ...], Instance] = {}
    for file in files:
        if file.parent.name == _WITHOUT_GPU:
            continue
        for instance in _instances(file):
            known = found.get(instance.key)
            if known is None or instance.usd_per_hour < known.usd_per_hour:
                found[instance.key] = instance
    skipped = (
        "; gcp's rows leave out the GPU's price and were skipped"
        if _WITHOUT_GPU in {file.parent.name for file in files}
        else ""
    )
    return tuple(found.values()), f"{len(found)} instances from SkyPilot's catalogue {versions[-1].name}{skipped}"


def _instances(file: Path) -> Iterator[Instance]:
    day = datetime.date.fromtimestamp(file.stat().st_mtime)
    source = f"SkyPilot's catalogue {file.parent.parent.name}, {file.parent.name}/vms.csv"
    try:
        with open(file, newline="", encoding="utf-8") as lines:
            for number, row in enumerate(csv.DictReader(lines)):
                if number > _MOST_ROWS:
                    break
                instance = _instance(row, file.parent.name, source, day)
                if instance is not None:
                    yield instance
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{file} cannot be read ({error})", "Delete it: SkyPilot fetches it again.") from error


def _instance(row: dict[str, str], provider: str, source: str, day: datetime.date) -> Instance | None:
    gpu, name = _OUR_NAMES.get(row.get("AcceleratorName") or ""), row.get("InstanceType") or ""
    price, count = _number(row.get("Price")), _number(row.get("AcceleratorCount"))
    if gpu is None or not name or not price or not count or count != int(count):
        return None
    spot = _number(row.get("SpotPrice"))
    figure = Figure(value=spot, source=source, as_of=day, confidence="V") if spot else None
    return Instance(
        provider=provider,
        name=_clean(name),
        region=_clean(row.get("Region") or "any"),
        gpu=gpu,
        gpus=int(count),
        usd_per_hour=price,
        spot=figure,
        source=source,
        as_of=day,
        confidence="V",
    )


def _clean(text: str) -> str:
    return printable(text, "")[:80]


def _number(text: str | None) -> float:
    """0 for what is no positive number."""
    try:
        value = float(text or "")
    except ValueError:
        return 0.0
    return value if 0 < value < 1e6 else 0.0


def task(model: str, gpu: Gpu, gpus: int, context: int) -> str:
    """A SkyPilot task in YAML that serves `model`, a hub id, with vLLM. Raises BadInput for what is no hub id."""
    if not _MODEL.fullmatch(model):
        raise BadInput(
            f"{model!r} is not the id of a model on a hub, so nothing could serve it",
            "Name it as ORGANISATION/MODEL with --model.",
        )
    accelerator = _THEIR_NAMES.get(gpu.name, gpu.name)
    commands = "\n".join(f"#   {line}" for line in _steps("THIS_FILE", model))
    return f"""\
# Serves the same model on a rented GPU, to be measured through an ssh tunnel. It costs money until `sky down`.
{commands}
name: {_CLUSTER}

resources:
  accelerators: {accelerator}:{gpus}
  disk_size: 256

envs:
  MODEL: {model}

setup: |
  pip install uv
  uv venv --python 3.12 ~/vllm
  source ~/vllm/bin/activate
  uv pip install vllm

run: |
  source ~/vllm/bin/activate
  vllm serve "$MODEL" --host 127.0.0.1 --port {_PORT} --max-model-len {context} --tensor-parallel-size {gpus}
"""


def how_to_measure(path: Path, model: str) -> str:
    """What to type next."""
    return "\n".join([f"Wrote {path}. Rent, measure, return:", *(f"  {line}" for line in _steps(str(path), model))])


def _steps(path: str, model: str) -> list[str]:
    return [
        f"sky launch -d -c {_CLUSTER} {path}",
        f"ssh -f -N -L {_PORT}:localhost:{_PORT} {_CLUSTER}",
        f"pocketmoe compare PROFILE --endpoint http://localhost:{_PORT} --model {model} -o DIR",
        f"sky down {_CLUSTER}",
    ]
