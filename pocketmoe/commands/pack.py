"""pack: experts as this machine's CPU wants them, before the first run, or in the place of the published ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pocketmoe.console.options import bundle_argument, examples, find_bundle, packed_dir_option
from pocketmoe.console.progress import ProgressBar

if TYPE_CHECKING:
    from pocketmoe.bundle.packed import PackedPlace


@click.command(epilog=examples(*(f"pocketmoe pack SMALL{how}" for how in ("", " --in-place", " --undo"))))
@bundle_argument
@click.option("--in-place", "how", flag_value="in-place", help="Keep the experts only so: the bundle is half as large.")
@click.option("--undo", "how", flag_value="undo", help="Read them back as they were published, on whatever machine.")
@packed_dir_option
def pack(bundle: str, how: str | None, packed: PackedPlace | None) -> None:
    """Pack the experts of BUNDLE for this machine.

    `run` does so at its first start, which this takes out of it; the packed experts lie beside the others and double
    them. In place, the published ones are given up as they are packed, a few at a time; every command goes on reading
    them back from there. Another CPU or version of ONNX Runtime says that it has to pack them anew. A killed run is
    gone on with by the next one.
    """
    from pocketmoe.bundle.reader import Bundle
    from pocketmoe.runtime.backends.pack import pack as pack_experts
    from pocketmoe.runtime.backends.pack import unpack

    if how and packed and packed.always:
        raise click.UsageError(f"--packed-dir is for experts beside the published ones: leave out --{how}.")
    opened = Bundle.open(find_bundle(bundle), packed)
    with ProgressBar() as bar:
        folder = unpack(opened, bar) if how == "undo" else pack_experts(opened, in_place=bool(how), progress=bar)
    click.echo(folder)
