"""export: a checkpoint to a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from pocketmoe.console.options import (
    complete_schemes,
    examples,
    output_option,
    packed_option,
    say_written,
    usage,
    what_is_there,
    workers_option,
)
from pocketmoe.console.progress import ProgressBar


@click.command(
    epilog=examples(
        "pocketmoe export allenai/OLMoE-1B-7B-0924 -o SMALL --scheme int4",
        "pocketmoe export ./my-checkpoint -o BUNDLE --adapter ./my-lora",
    )
)
@click.argument("checkpoint")
@output_option
@click.option(
    "--scheme",
    metavar="NAME",
    shell_complete=complete_schemes,
    help="Quantize on the way: int8, int4, int4-all, int2, nf4 or fp4; keep: the codes of a CHECKPOINT that is "
    "quantized already; float32. Default: keep where there are codes, else float32.",
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
@packed_option
def export(
    checkpoint: str,
    output: Path,
    scheme: str | None,
    revision: str | None,
    trust_remote_code: bool,
    adapter: str | None,
    workers: int | str | None,
    packed: bool,
) -> None:
    """Turn CHECKPOINT into a bundle.

    A bundle holds ONNX graphs, dense weights, and experts to be paged. CHECKPOINT is a directory with safetensors, a
    GGUF file, or a model of the Hugging Face hub (allenai/OLMoE-1B-7B-0924), which is downloaded into the hub's cache.
    Killed, the same command goes on where it was.
    """
    from pocketmoe.pipeline import export as pipeline

    with usage():
        request = pipeline.ExportRequest(
            scheme=scheme,
            revision=revision,
            trust_remote_code=trust_remote_code,
            adapter=adapter,
            workers=workers,
            packed=packed,
        )
    replaced = what_is_there(output)
    with ProgressBar(phases=True) as bar:
        bundle = pipeline.export(checkpoint, output, request, bar)
    say_written(bundle, replaced)
