"""quantize: a bundle to a smaller one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from pocketmoe.console.numbers import MOST_TOKENS, PATH, ByteSize, Parameter, Whole
from pocketmoe.console.options import (
    bundle_argument,
    complete_schemes,
    examples,
    find_bundle,
    output_option,
    packed_option,
    say_written,
    usage,
    what_is_there,
    workers_option,
)
from pocketmoe.console.progress import ProgressBar
from pocketmoe.errors import require
from pocketmoe.sizes import in_words

if TYPE_CHECKING:
    from pocketmoe.quantize.algorithms.formats import Format
    from pocketmoe.quantize.plan import QuantizationPlan, SizeBudget


class SizeBudgetType(Parameter):
    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> SizeBudget:
        from pocketmoe.quantize.plan import SizeBudget

        try:
            return SizeBudget.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class ClassFormat(Parameter):
    name = "CLASS=FORMAT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Format]:
        from pocketmoe.quantize.algorithms.formats import parse_format

        name, _, label = value.partition("=")
        try:
            return name, parse_format(label)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command(
    epilog=examples(
        "pocketmoe quantize BUNDLE -o SMALL --scheme int4",
        "pocketmoe quantize BUNDLE -o SMALL --scheme mixed --size-budget 15% --calibration texts/",
        "pocketmoe quantize BUNDLE -o SMALL --scheme keep --kv int8 --calibration text.txt",
    )
)
@bundle_argument
@output_option
@click.option(
    "--scheme",
    default="int4",
    show_default=True,
    metavar="NAME",
    shell_complete=complete_schemes,
    help="int8, int4, int4-all, int2, nf4, fp4; mixed: the best for a budget; keep: weights as they are, for --kv "
    "alone.",
)
@click.option(
    "--format",
    "formats",
    type=ClassFormat(),
    multiple=True,
    metavar="CLASS=FORMAT",
    help="Another format for experts, attention, shared_expert, head, embedding or other: attention=int4-b32-asym, "
    "experts=nf4-b64. May be given again.",
)
@click.option(
    "--size-budget",
    type=SizeBudgetType(),
    metavar="SIZE",
    help="For mixed: how large the new bundle may be: 900MB, 15% of BUNDLE, or 3.5bits a weight on average.",
)
@click.option(
    "--fetch-budget",
    type=ByteSize(),
    metavar="SIZE",
    help="For mixed: how many bytes of experts a token may touch, as the calibration text is routed: 40MB.",
)
@click.option(
    "--rounding",
    metavar="NAME",
    help="nearest, search, k-quant, hqq, or gptq, which goes by --calibration. Default: gptq with it, search without.",
)
@click.option(
    "--kv",
    type=click.Choice(["float32", "int8"], case_sensitive=False),
    default="float32",
    show_default=True,
    help="What tokens leave behind for later ones: int8 takes a quarter of the memory. Needs --calibration.",
)
@click.option(
    "--calibration",
    type=PATH,
    metavar="TEXT",
    help="A text file, or a directory of *.txt, of the kinds that the model will meet.",
)
@click.option(
    "--calibration-tokens",
    type=Whole(512, MOST_TOKENS),
    default=16384,
    show_default=True,
    metavar="N",
    help="How many tokens of it to go by, taken evenly from all. More take longer, and are worth most where experts "
    "are many.",
)
@workers_option
@packed_option
def quantize(
    bundle: str,
    output: Path,
    scheme: str,
    size_budget: SizeBudget | None,
    fetch_budget: int | None,
    formats: tuple[tuple[str, Format], ...],
    rounding: str | None,
    kv: Literal["float32", "int8"],
    calibration: Path | None,
    calibration_tokens: int,
    workers: int | str | None,
    packed: bool,
) -> None:
    """Write BUNDLE with smaller weights.

    And with smaller caches, if wanted, as another bundle.
    """
    require("onnx_ir", "quantize")
    from pocketmoe.pipeline import quantize as pipeline
    from pocketmoe.runtime.backends.pack import pack

    with usage():
        request = pipeline.QuantizeRequest(
            scheme=scheme,
            formats=dict(formats),
            size_budget=size_budget,
            fetch_budget=fetch_budget,
            rounding=rounding,
            kv=kv,
            calibration=calibration,
            calibration_tokens=calibration_tokens,
            workers=workers,
        )
    root = find_bundle(bundle)
    replaced = what_is_there(output)
    with ProgressBar(phases=True) as bar:
        quantized = pipeline.quantize(root, output, request, bar)
        if packed:
            pack(quantized.bundle, in_place=True, progress=bar)
    say_written(quantized.bundle, replaced)
    if quantized.plan:
        _say_plan(quantized.plan)


def _say_plan(plan: QuantizationPlan) -> None:
    click.echo(
        f"Plan: {plan.mean_bits:.2f} bits a weight, {plan.mean_expert_bits:.2f} in experts; expected KL "
        f"{plan.expected_kl:.4f} nats, {in_words(int(plan.expected_fetched_bytes_per_token))} of experts a token.",
        err=True,
    )
