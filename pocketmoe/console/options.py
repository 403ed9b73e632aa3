"""What several commands share: arguments and options, sizes, how results are said."""

from __future__ import annotations

import codecs
import contextlib
import functools
import json
import os
import re
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from pocketmoe.console.numbers import BUNDLE, PATH, SHARE, THREADS, ByteSize, MemorySize, Parameter, Workers
from pocketmoe.console.progress import ProgressBar
from pocketmoe.errors import UnknownName, printable
from pocketmoe.sizes import in_words

if TYPE_CHECKING:
    from pocketmoe.bundle.packed import PackedPlace
    from pocketmoe.bundle.reader import Bundle
    from pocketmoe.runtime.prefix_cache.kept import PrefixCacheRequest


class PolicyName(Parameter):
    name = "NAME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:  # noqa: ARG002 - click's signature
        from pocketmoe.profiles.routing.policies import POLICIES

        if value.lower() not in POLICIES:
            raise UnknownName("policy", value, POLICIES)
        return value.lower()


def complete_bundles(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """A bundle is a directory, which the shell completes."""
    return [CompletionItem(incomplete, type="dir")]


def complete_schemes(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    from pocketmoe.quantize.schemes import SCHEMES

    return [name for name in (*SCHEMES, "keep") if name.startswith(incomplete.lower())]


def complete_devices(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    from pocketmoe.profiles.catalogue.devices import known_devices

    return [name for name in ("this", *known_devices()) if name.startswith(incomplete.lower())]


bundle_argument = click.argument("bundle", type=BUNDLE, shell_complete=complete_bundles)
output_option = click.option("-o", "--output", required=True, type=PATH, help="Where the bundle goes.")
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else there."
)
memory_option = click.option(
    "--memory",
    type=MemorySize(),
    metavar="SIZE",
    help="For the whole process: 800MB, 1.5GiB, 4G; or 40%: room for 40% of the experts. Default: 80% of what is free.",
)
workers_option = click.option(
    "--workers",
    type=Workers(),
    help="What quantizes the experts: so many threads (default: one per core); ray: processes of Ray on this machine; "
    "ray://HOST:PORT: a Ray cluster. The result is the same.",
)
packed_option = click.option(
    "--packed",
    is_flag=True,
    help="Keep the experts only as this machine's CPU wants them, as `pocketmoe pack --in-place` does: no first start "
    "packs them, and they are on disk once.",
)


def packed_place(directory: Path | None) -> PackedPlace | None:
    """The place for packed experts that was named; else the user's cache, for bundles that cannot be written."""
    from pocketmoe.bundle.packed import PackedPlace

    if directory is not None:
        return PackedPlace(directory, always=True)
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "")
        cache = cache if cache.is_absolute() else Path.home() / ".cache"
    except RuntimeError:  # nobody knows whose home it would be
        return None
    return PackedPlace(cache / "pocketmoe" / "packed")


def _packed_place(_ctx: click.Context, _param: click.Parameter, directory: Path | None) -> PackedPlace | None:
    return packed_place(directory)


packed_dir_option = click.option(
    "--packed-dir",
    "packed",
    type=PATH,
    metavar="DIR",
    callback=_packed_place,
    help="Where experts go as this CPU wants them. Default: into the bundle or, where it cannot be written, into "
    "$XDG_CACHE_HOME/pocketmoe/packed (~/.cache); `pocketmoe packed` lists and removes them.",
)
backend_option = click.option(
    "--backend",
    type=click.Choice(["auto", "slots", "sessions"], case_sensitive=False),
    default="auto",
    show_default=True,
)
threads_option = click.option("--threads", type=THREADS, help="Default: one per physical core.")


drop_cold_option = click.option(
    "--drop-cold",
    type=SHARE,
    default=0.0,
    metavar="SHARE",
    help="Leave out experts that are not in memory and weigh less than SHARE of their token's mean. Faster and not the "
    "model's own answer: it depends on the memory. Default: 0, exact.",
)

prefer_cached_option = click.option(
    "--prefer-cached",
    type=SHARE,
    default=0.0,
    metavar="STRENGTH",
    help="While answering, raise the router's scores of experts in memory by STRENGTH of the scores' range; a token's "
    "first choices stay. Reads less and is not the model's own answer: it depends on the memory. Default: 0, exact.",
)


def _prefix_cache(prefix_cache: Path | None, prefix_cache_size: int | None) -> PrefixCacheRequest | None:
    if prefix_cache is None:
        if prefix_cache_size is not None:
            raise click.UsageError("--prefix-cache-size goes with --prefix-cache.")
        return None
    from pocketmoe.runtime.prefix_cache.kept import DEFAULT_BYTES, PrefixCacheRequest

    return PrefixCacheRequest(prefix_cache, prefix_cache_size or DEFAULT_BYTES)


def prefix_cache_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that a command gets as one `prefix_cache`, None where none is wanted."""
    return gathered(
        "prefix_cache",
        _prefix_cache,
        click.option(
            "--prefix-cache",
            type=PATH,
            metavar="DIR",
            help="Keep in DIR what prompts compute, so that a text which begins alike goes on from there, also after a "
            "restart. It reveals the texts; `pocketmoe prefix-cache DIR --clear` removes it. Default: nothing is kept.",
        ),
        click.option(
            "--prefix-cache-size",
            type=ByteSize(),
            metavar="SIZE",
            help="The most that may be kept there, what was not used for longest going first. Default: 2GB.",
        ),
    )(command)


def examples(*lines: str) -> str:
    """The end of a command's help: calls that work as they stand, but for names."""
    return "\n  ".join(["\b\nExamples:", *lines])


def gathered(name: str, record: Callable[..., Any], *options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Options whose values a command gets together: as its parameter `name`, what `record` makes of them by name."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def with_record(**values: Any) -> Any:
            together = record(**{own: values.pop(own) for own in names})
            return command(**values, **{name: together})

        before = len(getattr(command, "__click_params__", ()))
        for option in reversed(options):
            option(with_record)
        names = [parameter.name for parameter in vars(with_record)["__click_params__"][before:]]
        return with_record

    return decorate


@contextlib.contextmanager
def usage() -> Generator[None]:
    """A request that the library refuses to make (ValueError) is a wrong use of the command that asked for it."""
    try:
        yield
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def find_bundle(name: str, *, quiet: bool = False) -> Path:
    """The directory of the bundle that was named; one of the hub is downloaded, which is said on stderr."""
    from pocketmoe.bundle.progress import no_progress
    from pocketmoe.hub import pull

    with ProgressBar() as bar:
        return pull.find_bundle(name, progress=no_progress if quiet else bar)


def what_is_there(output: Path) -> str | None:
    """The bundle that will be replaced, in words; None where there is none."""
    from pocketmoe.bundle.manifest import MANIFEST, read_manifest
    from pocketmoe.errors import PocketMoEError

    if not os.path.isfile(output / MANIFEST):  # noqa: PTH113 - never raises
        return None
    try:
        manifest = read_manifest(output / MANIFEST)
    except PocketMoEError:
        return "a damaged bundle"
    schemes = ", ".join(sorted({kind.scheme for kind in manifest.expert_kinds}))
    return f"{printable(manifest.provenance.source)}, experts in {schemes}, {manifest.sha256[:12]}"


def say_written(bundle: Bundle, replaced: str | None = None) -> None:
    """`replaced`: `what_is_there` from before; the same bundle again is nothing lost."""
    if replaced is not None and not replaced.endswith(bundle.manifest.sha256[:12]):
        click.echo(f"Replaced the bundle that was there: {replaced}.", err=True)
    total = sum(entry.nbytes for entry in bundle.manifest.files.values())
    click.echo(f"Wrote {bundle.root} ({in_words(total)}).", err=True)
    for note in bundle.manifest.notes:
        click.echo(f"Note: {note}", err=True)


def print_json(record: Any, **more: Any) -> None:
    """A record, with further fields, as one object; in ASCII where stdout cannot hold all characters."""
    import msgspec

    print_line(**{**msgspec.to_builtins(record), **more})


def print_line(**fields: Any) -> None:
    """One JSON object in a line, which is out at once."""
    holds_all = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
    text = json.dumps(fields, ensure_ascii=not holds_all)
    click.echo(re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text))
