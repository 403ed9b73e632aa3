"""export: a checkpoint to a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from pocketmoe.console.options import (
    complete_schemes,
    examples,
    output_option,
    packed_option,
    require,
    say_written,
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
    require("torch", "export")
    scheme = scheme.lower() if scheme else None
    if workers and scheme in (None, "keep", "float32"):
        raise click.UsageError("--workers is for a --scheme that rounds: without it experts are only copied.")
    with ProgressBar(phases=True) as bar:
        bar("looking at the checkpoint", 0, 1)
        _check(scheme, output)
        source, merged = _found(checkpoint, revision, trust_remote_code, adapter, bar)
        from pocketmoe.quantize.apply import for_export

        quantizer, keeper = for_export(scheme, workers)
        replaced = what_is_there(output)
        from pocketmoe.export.convert import export_checkpoint  # torch takes seconds

        bundle = export_checkpoint(
            source,
            output,
            quantizer=quantizer,
            keeper=keeper,
            must_keep=scheme == "keep",
            run_its_code=trust_remote_code,
            adapter=merged,
            progress=bar,
        )
        if packed:
            from pocketmoe.runtime.backends.pack import pack

            pack(bundle, in_place=True, progress=bar)
    say_written(bundle, replaced)


def _check(scheme: str | None, output: Path) -> None:
    """What needs neither the checkpoint nor torch."""
    from pocketmoe.export.early_checks import check_target
    from pocketmoe.quantize.schemes import find_scheme

    if scheme not in (None, "keep", "float32"):
        find_scheme(scheme)
    check_target(output)


def _found(
    checkpoint: str, revision: str | None, code: bool, adapter: str | None, bar: ProgressBar
) -> tuple[Path, Path | None]:
    """Where checkpoint and adapter are, once all has been checked that needs no torch."""
    from pocketmoe.export.checkpoint import hub
    from pocketmoe.export.early_checks import check_hub, check_source

    check_hub(checkpoint, revision)
    source = hub.find(checkpoint, revision=revision, code=code, progress=bar)
    merged = hub.find(adapter, progress=bar) if adapter is not None else None
    if not source.is_file():  # a GGUF file says it all by itself
        check_source(source, code, merged is not None)
    return source, merged
