"""From bundles to smaller ones: quantize."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pocketmoe.console.numbers import MOST_TOKENS, PATH, ByteSize, Whole
from pocketmoe.console.options import bundle_argument, output_option, require, say_written, workers_option
from pocketmoe.console.progress import ProgressBar
from pocketmoe.sizes import in_words

if TYPE_CHECKING:
    from pocketmoe.bundle.reader import Bundle
    from pocketmoe.quantize.algorithms.formats import Format
    from pocketmoe.quantize.plan import Plan, SizeBudget
    from pocketmoe.quantize.schemes import Scheme

MIXED, GPTQ, SEARCH = "mixed", "gptq", "search"


class SizeBudgetType(click.ParamType):
    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> SizeBudget:
        from pocketmoe.quantize.plan import SizeBudget

        try:
            return SizeBudget.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class ClassFormat(click.ParamType):
    name = "CLASS=FORMAT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Format]:
        from pocketmoe.quantize.algorithms.formats import parse_format

        name, _, label = value.partition("=")
        try:
            return name, parse_format(label)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command()
@bundle_argument
@output_option
@click.option(
    "--scheme",
    default="int4",
    show_default=True,
    metavar="NAME",
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
    type=click.Choice(["float32", "int8"]),
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
def quantize(
    bundle: Path,
    output: Path,
    scheme: str,
    size_budget: SizeBudget | None,
    fetch_budget: int | None,
    formats: tuple[tuple[str, Format], ...],
    rounding: str | None,
    kv: str,
    calibration: Path | None,
    calibration_tokens: int,
    workers: int | str | None,
) -> None:
    """Write BUNDLE with smaller weights, and caches if wanted, as another bundle."""
    require("onnx_ir", "quantize")
    from pocketmoe.pipeline import measuring
    from pocketmoe.profiles.quality.quality import read_slices
    from pocketmoe.quantize.apply import KEEP, quantize_bundle
    from pocketmoe.quantize.mixed.choose import scheme_of
    from pocketmoe.quantize.workers import check_workers

    rounding = rounding or (GPTQ if calibration else SEARCH)
    if calibration is None:
        _refuse_without_text(scheme, rounding, kv)
    _refuse_combination(scheme, bool(formats), size_budget is not None or fetch_budget is not None)
    check_workers(workers)
    source = _open(bundle, is_kept=scheme == KEEP)
    chosen = None if scheme == MIXED else _scheme(scheme, rounding, dict(formats))
    caches = measured = plan = made = None
    with ProgressBar() as bar, contextlib.ExitStack() as stack:
        if calibration:
            asked = f"{scheme} {rounding} {size_budget} {fetch_budget}"
            slices = read_slices(calibration)
            text = stack.enter_context(
                measuring(source, slices, calibration_tokens, output, asked, scheme == MIXED, bar)
            )
            caches = text.calibrate_caches() if kv == "int8" else None
            measured = text.calibrate() if scheme != KEEP else None
            if measured and chosen is None:
                plan = text.plan(measured, size_budget, fetch_budget, rounding)
                chosen, made = scheme_of(plan, rounding), text.made()
        assert chosen is not None, "mixed precision is always calibrated"
        quantized = quantize_bundle(
            bundle,
            output,
            scheme=chosen,
            caches=caches,
            calibration=measured,
            plan=plan,
            made=made,
            progress=bar,
            workers=workers,
        )
    say_written(quantized)
    if plan:
        _say_plan(plan)


def _open(path: Path, is_kept: bool) -> Bundle:
    """The bundle to quantize, its graphs checked before the onnx package reads them. Raises BadInput."""
    from pocketmoe.bundle.reader import Bundle
    from pocketmoe.quantize.apply import refuse_quantized
    from pocketmoe.runtime.backends.graph_checks import check_graphs

    bundle = Bundle.open(path)
    check_graphs(bundle)
    if not is_kept:
        refuse_quantized(bundle)
    return bundle


def _refuse_without_text(scheme: str, rounding: str, kv: str) -> None:
    if kv == "int8" or scheme == MIXED or rounding == GPTQ:
        raise click.UsageError(
            "--kv int8, --scheme mixed and --rounding gptq need --calibration TEXT: they go by what a text shows."
        )


def _refuse_combination(scheme: str, formats: bool, budget: bool) -> None:
    from pocketmoe.quantize.apply import KEEP

    if formats and scheme in (MIXED, KEEP):
        raise click.UsageError(f"--format does not go with --scheme {scheme}.")
    if budget != (scheme == MIXED):
        raise click.UsageError("--scheme mixed needs --size-budget or --fetch-budget, which are for it alone.")


def _say_plan(plan: Plan) -> None:
    click.echo(
        f"Plan: {plan.mean_bits:.2f} bits a weight, {plan.mean_expert_bits:.2f} in experts; expected KL "
        f"{plan.expected_kl:.4f} nats, {in_words(int(plan.expected_fetched_bytes_per_token))} of experts a token.",
        err=True,
    )


def _scheme(name: str, rounding: str, formats: dict[str, Format]) -> str | Scheme:
    from dataclasses import replace

    from pocketmoe.quantize.algorithms.choice import find_rounder
    from pocketmoe.quantize.apply import KEEP
    from pocketmoe.quantize.schemes import find_scheme, override

    find_rounder(rounding)
    if name == KEEP:
        return name
    return replace(override(find_scheme(name), formats), rounding=rounding)
