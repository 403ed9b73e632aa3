"""From checkpoints to bundles, and on: export, export-portable."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pocketmoe.console.numbers import PATH
from pocketmoe.console.options import bundle_argument, output_option, require, say_written, workers_option
from pocketmoe.console.progress import ProgressBar
from pocketmoe.sizes import in_words

if TYPE_CHECKING:
    from pocketmoe.export.portable.portable import ExpertsForm


@click.command()
@click.argument("checkpoint")
@output_option
@click.option(
    "--scheme", metavar="NAME", help="Quantize on the way: int8, int4, int4-all, int2, nf4 or fp4. Default: float32."
)
@click.option("--revision", metavar="REVISION", help="Branch, tag or commit on the hub. Default: main.")
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run Python code that comes with CHECKPOINT, with all your rights, where transformers lacks the model.",
)
@click.option(
    "--adapter", metavar="ADAPTER", help="A LoRA adapter, by directory or hub id, to merge into CHECKPOINT's weights."
)
@workers_option
def export(
    checkpoint: str,
    output: Path,
    scheme: str | None,
    revision: str | None,
    trust_remote_code: bool,
    adapter: str | None,
    workers: int | str | None,
) -> None:
    """Turn CHECKPOINT into a bundle of ONNX graphs and paged experts.

    CHECKPOINT is a directory with safetensors, or a model of the Hugging Face hub (allenai/OLMoE-1B-7B-0924), which is
    downloaded into the hub's cache. Killed, the same command goes on where it was.
    """
    require("torch", "export")
    if workers and not scheme:
        raise click.UsageError("--workers is for --scheme: without it experts are only copied.")
    from pocketmoe.export.checkpoint.hub import find
    from pocketmoe.quantize.apply import Quantizer

    quantizer = Quantizer.of(scheme, workers) if scheme else None
    with ProgressBar() as bar:
        source = find(checkpoint, revision=revision, code=trust_remote_code, progress=bar)
        merged = find(adapter, progress=bar) if adapter is not None else None
        from pocketmoe.export.convert import export_checkpoint  # torch takes seconds

        bundle = export_checkpoint(
            source, output, quantizer=quantizer, run_its_code=trust_remote_code, adapter=merged, progress=bar
        )
    say_written(bundle)


@click.command("export-portable")
@bundle_argument
@click.option("-o", "--output", required=True, type=PATH, help="Where the model goes, its data file beside.")
@click.option(
    "--experts",
    type=click.Choice(["if", "qmoe"]),
    default="if",
    show_default=True,
    help="By If, with the tokens of `run`, bit for bit; or by QMoE where it fits, faster and rounded otherwise.",
)
def export_portable(bundle: Path, output: Path, experts: ExpertsForm) -> None:
    """Write BUNDLE as one ONNX model with external data, for any stock ONNX Runtime."""
    require("onnx_ir", "export-portable")
    from pocketmoe.bundle.reader import Bundle
    from pocketmoe.export.portable import portable
    from pocketmoe.runtime.backends.graph_checks import check_graphs

    check_graphs(Bundle.open(bundle))  # before the onnx package reads them
    with ProgressBar() as bar:
        written = portable.export_portable(bundle, output, experts=experts, progress=bar)
    layers = ", ".join(f"{op} in {count} layers" for op, count in written.experts.items())
    click.echo(f"Wrote {written.model} and {written.data.name} ({in_words(written.nbytes)}; {layers}).", err=True)
