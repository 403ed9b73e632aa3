"""serve: bundles over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pocketmoe.console.numbers import BUNDLE, MOST_TOKENS, PATH, Duration, Whole
from pocketmoe.console.options import (
    drop_cold_option,
    examples,
    memory_option,
    packed_dir_option,
    prefer_cached_option,
    prefix_cache_options,
    threads_option,
)

if TYPE_CHECKING:
    from pocketmoe.bundle.packed import PackedPlace
    from pocketmoe.runtime.engine.memory_plan import MemoryRequest
    from pocketmoe.runtime.prefix_cache.kept import PrefixCacheRequest


@click.command(
    short_help="Answer requests for BUNDLE... over HTTP.",
    epilog=examples(
        "pocketmoe serve SMALL --memory 4GB",
        "pocketmoe serve SMALL LARGE --name small --name large --memory 6GB --idle-unload 10m",
        "pocketmoe serve SMALL --memory 4GB --ray local --replicas 2",
        "pocketmoe serve SMALL --host 0.0.0.0 --api-key-file keys.txt --allow-host box.example",
    ),
)
@click.argument("bundles", metavar="BUNDLE...", type=BUNDLE, nargs=-1, required=True)
@click.option(
    "--name", "names", multiple=True, metavar="NAME", help="What requests call a model; once for each BUNDLE."
)
@memory_option
@click.option(
    "--context",
    type=Whole(2, MOST_TOKENS),
    metavar="N",
    help="The longest text in tokens, for which memory is set aside. Default: 4096, or the model's own.",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="The address to listen on; any but this machine's own asks for a key.",
)
@click.option("--port", type=Whole(0, 65535), default=8080, show_default=True, help="0: any that is free.")
@click.option(
    "--parallel",
    type=Whole(1, 64),
    help="Answers at once, each with memory for the whole context. Default: up to 4, as a tenth of --memory allows.",
)
@click.option(
    "--queue", type=Whole(0, 4096), default=32, show_default=True, help="Requests that wait; more are refused."
)
@click.option("--api-key-file", type=PATH, metavar="FILE", help="Keys, one a line; or POCKETMOE_API_KEY.")
@click.option("--allow-host", multiple=True, metavar="NAME", help="A host name by which the server is reached.")
@click.option("--cors", multiple=True, metavar="ORIGIN", help="A page's origin that may call, as https://chat.example.")
@click.option("--idle-unload", type=Duration(), help="Give a model's memory back after so long without a request.")
@click.option("--elastic", is_flag=True, help="Take less than --memory while the system is short of memory.")
@click.option("--timeout", type=Duration(), default="30m", show_default=True, help="For a request, all in all.")
@click.option(
    "--no-structured",
    is_flag=True,
    help="Set no memory aside for answers that are held to a schema, and refuse requests for them.",
)
@click.option("--ray", metavar="ADDRESS", help="Replicas in that Ray cluster; `local`: in one that is started here.")
@click.option("--replicas", type=Whole(1, 1024), help="How many, with --ray.  [default: 2]")
@click.option("--log-text", is_flag=True, help="Log what is asked and answered too.")
@threads_option
@drop_cold_option
@prefer_cached_option
@prefix_cache_options
@packed_dir_option
def serve(
    bundles: tuple[str, ...],
    names: tuple[str, ...],
    memory: MemoryRequest | None,
    context: int | None,
    host: str,
    port: int,
    parallel: int | None,
    queue: int,
    api_key_file: Path | None,
    allow_host: tuple[str, ...],
    cors: tuple[str, ...],
    idle_unload: float | None,
    elastic: bool,
    timeout: float,
    no_structured: bool,
    ray: str | None,
    replicas: int | None,
    log_text: bool,
    threads: int | None,
    drop_cold: float,
    prefer_cached: float,
    prefix_cache: PrefixCacheRequest | None,
    packed: PackedPlace | None,
) -> None:
    """Answer requests for BUNDLE... over HTTP, by the APIs of OpenAI and Anthropic.

    All of it stays within --memory: models, requests and the server itself. One model is loaded at a time; another
    takes its place when a request asks for it. A line of JSON for each request goes to stderr, without its text. The
    first Ctrl-C or SIGTERM lets running answers end, the second does not.

    With --ray each replica is a process with --memory for itself, on any machine of the cluster that has the bundles.
    """
    from pocketmoe.errors import require

    require("uvicorn", "serve", "serve")
    from pocketmoe.console.keys import read_keys
    from pocketmoe.console.serving import named, run, usable_origins
    from pocketmoe.runtime.model import LoadRequest
    from pocketmoe.serve.server import ServeRequest

    places = (memory, context, threads, "auto", "auto", drop_cold, prefer_cached)
    load = LoadRequest(*places, structured=False if no_structured else None, prefix_cache=prefix_cache, packed=packed)
    request = ServeRequest(
        bundles=named(bundles, names),
        load=load,
        host=host,
        port=port,
        parallel=parallel,
        queue=queue,
        keys=read_keys(api_key_file),
        names=allow_host,
        origins=usable_origins(cors),
        idle_unload_s=idle_unload,
        elastic=elastic,
        timeout_s=timeout,
        log_text=log_text,
    )
    run(request, ray, replicas)
