"""What several commands share: arguments and options, sizes, how results are said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pocketmoe.errors import BadInput
from pocketmoe.sizes import in_words

if TYPE_CHECKING:
    from pocketmoe.bundle.reader import Bundle
    from pocketmoe.runtime.engine.memory_plan import MemoryRequest


class MemorySize(click.ParamType):
    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> MemoryRequest:
        from pocketmoe.runtime.engine.memory_plan import MemoryRequest

        try:
            return MemoryRequest.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class ByteSize(click.ParamType):
    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from pocketmoe.sizes import parse_size

        try:
            return parse_size(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(str(error), param, ctx)


class MemoryList(MemorySize):
    name = "LIST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        return [(text.strip(), super(MemoryList, self).convert(text, param, ctx)) for text in value.split(",")]


class PolicyName(click.ParamType):
    name = "NAME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from pocketmoe.profiles.routing.policies import POLICIES

        if value not in POLICIES:
            self.fail(f"{value!r} is not one of {', '.join(POLICIES)}", param, ctx)
        return value


class WorkersType(click.ParamType):
    name = "N|ray|ray://HOST:PORT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        text = str(value)
        number = int(text) if text.isdecimal() else 0
        if number < 1 and text != "ray" and not text.startswith("ray://"):
            self.fail(f"{text!r} is neither a number of threads, ray, nor ray://HOST:PORT", param, ctx)
        return number or text


_SIZE = MemorySize()
bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))
output_option = click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Where the bundle goes."
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else there."
)
memory_option = click.option(
    "--memory",
    type=_SIZE,
    metavar="SIZE",
    help="For the whole process: 800MB, 1.5GiB; or 40%: room for 40% of the experts.",
)
workers_option = click.option(
    "--workers",
    type=WorkersType(),
    help="What quantizes the experts: so many threads (default: one per core); ray: processes of Ray on this machine; "
    "ray://HOST:PORT: a Ray cluster. The result is the same.",
)
threads_option = click.option("--threads", type=click.IntRange(min=1), help="Default: one per physical core.")


drop_cold_option = click.option(
    "--drop-cold",
    type=click.FloatRange(0, 1),
    default=0.0,
    metavar="SHARE",
    help="Leave out experts that are not in memory and weigh less than SHARE of their token's mean. Faster and not the "
    "model's own answer: it depends on the memory. Default: 0, exact.",
)

prefer_cached_option = click.option(
    "--prefer-cached",
    type=click.FloatRange(0, 1),
    default=0.0,
    metavar="STRENGTH",
    help="While answering, raise the router's scores of experts in memory by STRENGTH of the scores' range; a token's "
    "first choices stay. Reads less and is not the model's own answer: it depends on the memory. Default: 0, exact.",
)


def require(package: str, command: str) -> None:
    """Say what to install where only the runtime is. Raises BadInput."""
    from importlib.util import find_spec

    if not find_spec(package):
        raise BadInput(
            f"{command} needs {package}, which is not installed", "Install it with: pip install 'pocketmoe[export]'."
        )


def say_written(bundle: Bundle) -> None:
    total = sum(entry.nbytes for entry in bundle.manifest.files.values())
    click.echo(f"Wrote {bundle.root} ({in_words(total)}).", err=True)
    for note in bundle.manifest.notes:
        click.echo(f"Note: {note}", err=True)


def print_json(record: Any, **more: Any) -> None:
    """A dataclass, with further fields, as one object."""
    from dataclasses import asdict

    click.echo(json.dumps({**asdict(record), **more}, ensure_ascii=False))
