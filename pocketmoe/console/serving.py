"""What `serve` does on the terminal: names for bundles, where it can be reached, how it ends."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pocketmoe.console.options import find_bundle
from pocketmoe.console.progress import ProgressBar
from pocketmoe.process import Stopped
from pocketmoe.runtime.memory.budget import refuse_over_budget
from pocketmoe.serve.guard import is_loopback
from pocketmoe.serve.server import ServeRequest, Serving

if TYPE_CHECKING:
    from pocketmoe.serve.replicas.cluster import Cluster

_NAME = re.compile(r"[\w.:/@+-]{1,200}", re.ASCII)
_ORIGIN = re.compile(r"https?://[^/\s?#@]{1,200}|null")


def named(bundles: Sequence[str], names: Sequence[str]) -> dict[str, Path]:
    """Bundles by the names that were given, or by those of their directories, or by hub ids; these are downloaded.

    Raises UsageError.
    """
    from pocketmoe.hub.pull import reference_of

    if names and len(names) != len(bundles):
        raise click.UsageError(f"There are {len(bundles)} bundles and {len(names)} names.")
    ids = [reference_of(bundle) for bundle in bundles]
    own = [
        known.repository if known else Path(bundle).resolve().name for bundle, known in zip(bundles, ids, strict=True)
    ]
    found = list(names or own)
    for name in found:
        if not _NAME.fullmatch(name):
            raise click.UsageError(f"{name[:40]!r} is no name for a model: use letters, digits and . : / @ + _ -")
    if len(set(found)) != len(found):
        raise click.UsageError(f"Two bundles are called {found[0]}: give each a --name.")
    return dict(zip(found, map(find_bundle, bundles), strict=True))


def usable_origins(origins: Sequence[str]) -> tuple[str, ...]:
    """Origins as browsers send them. Raises UsageError for what is none; there is no * on purpose."""
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise click.UsageError(f"{origin[:60]!r} is not an origin: write https://chat.example, without a path.")
    return tuple(origins)


def run(request: ServeRequest, ray: str | None, replicas: int | None) -> None:
    """Serve until a signal; with `ray`, the address of a cluster, by so many replicas.

    Raises UsageError for an address that needs a key and has none, and for replicas without a cluster or a budget.
    """
    if not is_loopback(request.host) and not request.keys:
        raise click.UsageError(
            f"--host {request.host} can be reached from other machines: give --api-key-file, or POCKETMOE_API_KEY."
        )
    if replicas and not ray:
        raise click.UsageError("--replicas go with --ray.")
    if ray and not request.load.memory:
        raise click.UsageError("--ray needs --memory: what each replica may take of its machine.")
    with ProgressBar() as bar:

        def write(line: str) -> None:
            bar.clear()
            click.echo(line, err=True)

        serving = _cluster(request, ray, replicas or 2, write) if ray else Serving(request, write, bar)

        def say_ready() -> None:
            bar.clear()
            click.echo(f"Serving {', '.join(request.bundles)} at {serving.url}/v1. Ctrl-C stops.", err=True)

        forced = serving.run(say_ready)
    if forced is not None:
        raise Stopped(forced) if forced != 2 else KeyboardInterrupt
    if isinstance(serving, Serving) and serving.peak_and_budget:
        refuse_over_budget(*serving.peak_and_budget)


def _cluster(request: ServeRequest, address: str, replicas: int, write: Callable[[str], None]) -> Cluster:
    from pocketmoe.serve.replicas.cluster import Cluster

    return Cluster(request, address, replicas, write)
