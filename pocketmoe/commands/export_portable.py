"""export-portable: a bundle to one ONNX model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pocketmoe.console.numbers import PATH
from pocketmoe.console.options import bundle_argument, examples, find_bundle
from pocketmoe.console.progress import ProgressBar
from pocketmoe.errors import require
from pocketmoe.sizes import in_words

if TYPE_CHECKING:
    from pocketmoe.export.portable.portable import ExpertsOperator


@click.command("export-portable", epilog=examples("pocketmoe export-portable SMALL -o model.onnx"))
@bundle_argument
@click.option("-o", "--output", required=True, type=PATH, help="Where the model goes, its data file beside.")
@click.option(
    "--experts",
    type=click.Choice(["if", "qmoe"], case_sensitive=False),
    default="if",
    show_default=True,
    help="By If, with the tokens of `run`, bit for bit; or by QMoE where it fits, faster and rounded otherwise.",
)
def export_portable(bundle: str, output: Path, experts: ExpertsOperator) -> None:
    """Write BUNDLE as one ONNX model.

    With external data, for any stock ONNX Runtime.
    """
    require("onnx_ir", "export-portable")
    from pocketmoe.bundle.reader import Bundle
    from pocketmoe.export.portable import portable
    from pocketmoe.runtime.backends.graph_checks import check_graphs

    root = find_bundle(bundle)
    check_graphs(Bundle.open(root))  # before the onnx package reads them
    with ProgressBar() as bar:
        written = portable.export_portable(root, output, experts=experts, progress=bar)
    layers = ", ".join(f"{op} in {count} layers" for op, count in written.experts.items())
    click.echo(f"Wrote {written.model} and {written.data.name} ({in_words(written.nbytes)}; {layers}).", err=True)
