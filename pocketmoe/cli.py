"""The command line: parses, calls, prints. Data goes to stdout, all else to stderr; imports wait for their command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pocketmoe import __version__
from pocketmoe.cli_profile import measure, profile
from pocketmoe.console import ProgressBar, in_words
from pocketmoe.errors import BadInput, PocketMoEError

if TYPE_CHECKING:
    from pocketmoe.bundle import Bundle
    from pocketmoe.export.portable import ExpertsForm
    from pocketmoe.runtime.engine import BackendName
    from pocketmoe.runtime.fitting import MemoryRequest
    from pocketmoe.runtime.prefetch import PrefetchMode

_EXIT_CODES = (
    "Exit codes: 0 ok, 1 bug, 2 usage, 3 bad input, 4 the memory budget cannot be met, 5 a quality gate failed."
)
_TRACE_WARNING = (
    "A trace reveals the text: expert ids alone reconstruct 91% of the tokens (arXiv 2602.04105). Keep it to yourself."
)


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PocketMoEError as error:  # the one place an error becomes a line and an exit code
            click.echo(f"Error: {error.one_line()}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("\nInterrupted.", err=True)
            ctx.exit(130)


class _MemorySize(click.ParamType):
    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> MemoryRequest:
        from pocketmoe.runtime.fitting import MemoryRequest

        try:
            return MemoryRequest.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _MemoryList(_MemorySize):
    name = "LIST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        return [(text.strip(), super(_MemoryList, self).convert(text, param, ctx)) for text in value.split(",")]


class _PolicyName(click.ParamType):
    name = "NAME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from pocketmoe.profiles.policies import POLICIES

        if value not in POLICIES:
            self.fail(f"{value!r} is not one of {', '.join(POLICIES)}", param, ctx)
        return value


_SIZE = _MemorySize()
_bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))
_output_option = click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Where the bundle goes."
)
_json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else there."
)
_memory_option = click.option(
    "--memory",
    type=_SIZE,
    metavar="SIZE",
    help="For the whole process: 800MB, 1.5GiB; or 40%: room for 40% of the experts.",
)
_threads_option = click.option("--threads", type=click.IntRange(min=1), help="Default: one per physical core.")


_drop_cold_option = click.option(
    "--drop-cold",
    type=click.FloatRange(0, 1),
    default=0.0,
    metavar="SHARE",
    help="Leave out experts that are not in memory and weigh less than SHARE of their token's mean. Faster and not the "
    "model's own answer: it depends on the memory. Default: 0, exact.",
)


@click.group(cls=_Commands, epilog=_EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Run Mixture-of-Experts language models on machines too small for them."""


main.add_command(profile)
main.add_command(measure)


@main.command()
@click.argument("checkpoint")
@_output_option
def export(checkpoint: str, output: Path) -> None:
    """Turn CHECKPOINT, a directory with safetensors, into a bundle of ONNX graphs and paged experts."""
    _require("torch", "export")
    from pocketmoe.export.convert import export_checkpoint

    with ProgressBar() as bar:
        bundle = export_checkpoint(Path(checkpoint), output, progress=bar)
    _say_written(bundle)


@main.command()
@_bundle_argument
@_output_option
@click.option("--scheme", default="int4", show_default=True, metavar="NAME", help="int8 or int4.")
def quantize(bundle: Path, output: Path, scheme: str) -> None:
    """Write BUNDLE with smaller weights as another bundle."""
    _require("onnx_ir", "quantize")
    from pocketmoe.quantize.apply import quantize_bundle

    with ProgressBar() as bar:
        quantized = quantize_bundle(bundle, output, scheme=scheme, progress=bar)
    _say_written(quantized)


@main.command("export-portable")
@_bundle_argument
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Where the model goes, its data file beside."
)
@click.option(
    "--experts",
    type=click.Choice(["if", "qmoe"]),
    default="if",
    show_default=True,
    help="By If, with the tokens of `run`, bit for bit; or by QMoE where it fits, faster and rounded otherwise.",
)
def export_portable(bundle: Path, output: Path, experts: ExpertsForm) -> None:
    """Write BUNDLE as one ONNX model with external data, for any stock ONNX Runtime."""
    _require("onnx_ir", "export-portable")
    from pocketmoe.export import portable

    with ProgressBar() as bar:
        written = portable.export_portable(bundle, output, experts=experts, progress=bar)
    layers = ", ".join(f"{op} in {count} layers" for op, count in written.experts.items())
    click.echo(f"Wrote {written.model} and {written.data.name} ({in_words(written.nbytes)}; {layers}).", err=True)


@main.command()
@_bundle_argument
@click.option("--prompt", required=True, metavar="TEXT", help="What to continue or, for a chat model, what to answer.")
@_memory_option
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="The longest answer.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True, help="Nucleus sampling."
)
@click.option("--seed", type=int, help="For the same samples again.")
@_threads_option
@click.option("--backend", type=click.Choice(["auto", "slots", "sessions"]), default="auto", show_default=True)
@click.option(
    "--prefetch",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Read what the next layer will probably want while the disk is idle; auto: where that is faster.",
)
@_drop_cold_option
@click.option("--raw", is_flag=True, help="Give the prompt as it is, without the model's chat template.")
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Record which experts each token was routed to, for `replay`. Whoever has the file can tell most of the text.",
)
@_json_option
def run(
    bundle: Path,
    prompt: str,
    memory: MemoryRequest | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    threads: int | None,
    backend: BackendName,
    prefetch: PrefetchMode,
    drop_cold: float,
    raw: bool,
    trace: Path | None,
    as_json: bool,
) -> None:
    """Generate text with BUNDLE, paging experts in from disk within the memory given."""
    from pocketmoe.runtime.run import RunRequest, run_prompt
    from pocketmoe.runtime.sampling import Sampling
    from pocketmoe.tables import run_table

    request = RunRequest(
        prompt=prompt,
        raw=raw,
        memory=memory,
        max_tokens=max_tokens,
        sampling=Sampling(temperature, top_p, seed),
        threads=threads,
        backend=backend,
        prefetch=prefetch,
        drop_cold=drop_cold,
        trace=trace,
    )
    if trace:
        click.echo(f"Recording to {trace}. {_TRACE_WARNING}", err=True)
    with ProgressBar() as bar:

        def show(piece: str) -> None:
            bar.clear()
            if not as_json:
                click.echo(piece, nl=False)

        report = run_prompt(bundle, request, on_text=show, progress=bar)
    if as_json:
        _print_json(report)
    else:
        click.echo()
        click.echo(run_table(report), err=True)


@main.command()
@_bundle_argument
@_json_option
def inspect(bundle: Path, as_json: bool) -> None:
    """Say what is in BUNDLE: architecture, experts, bytes by class, schemes, provenance."""
    from pocketmoe.bundle import Bundle
    from pocketmoe.inspection import inspect_bundle
    from pocketmoe.tables import inspection_table

    inspection = inspect_bundle(Bundle.open(bundle))
    if as_json:
        _print_json(inspection)
    else:
        click.echo(inspection_table(inspection))


@main.command()
@_bundle_argument
def verify(bundle: Path) -> None:
    """Check every hash of BUNDLE; exit 0, or list what is damaged and exit 3."""
    from pocketmoe.bundle import Bundle

    with ProgressBar() as bar:
        opened = Bundle.open(bundle)
        damages = list(opened.verify(bar))
    for damage in damages:
        click.echo(damage)
    if damages:
        raise BadInput(f"{bundle} is damaged in {len(damages)} places", "Export or copy it again.")
    click.echo(f"{len(opened.manifest.files) + 1} files, every hash matches.")


@main.command("eval")
@_bundle_argument
@click.option("--text", required=True, type=click.Path(path_type=Path), help="A text file, or a directory of *.txt.")
@click.option(
    "--reference", type=click.Path(path_type=Path), help="The bundle to be compared with, say before quantizing."
)
@_memory_option
@click.option("--max-tokens", type=click.IntRange(min=2), help="Of each text, its first ones. Default: all.")
@_drop_cold_option
@_threads_option
@_json_option
def evaluate(
    bundle: Path,
    text: Path,
    reference: Path | None,
    memory: MemoryRequest | None,
    max_tokens: int | None,
    drop_cold: float,
    threads: int | None,
    as_json: bool,
) -> None:
    """Say how well BUNDLE predicts a text: perplexity; against a reference KL, top-1 and router agreement."""
    from pocketmoe.bundle import Bundle
    from pocketmoe.profiles import quality
    from pocketmoe.runtime.engine import EngineOptions
    from pocketmoe.runtime.fitting import MemoryRequest
    from pocketmoe.runtime.run import default_threads
    from pocketmoe.tables import quality_table

    options = EngineOptions(memory=memory or MemoryRequest(), threads=threads or default_threads(), drop_cold=drop_cold)
    with ProgressBar() as bar:
        report = quality.evaluate(
            Bundle.open(bundle),
            quality.read_slices(text),
            reference=Bundle.open(reference) if reference else None,
            options=options,
            max_tokens=max_tokens,
            progress=bar,
        )
    if as_json:
        _print_json(report)
    else:
        click.echo(quality_table(report))


@main.command()
@click.argument("trace", type=click.Path(path_type=Path))
@click.option(
    "--memory",
    type=_MemoryList(),
    metavar="LIST",
    default="6.25%,12.5%,25%,50%,75%",
    show_default=True,
    help="Budgets: shares of the experts, or sizes of the whole process.",
)
@click.option("--bundle", type=click.Path(path_type=Path), help="Whose sizes to reckon with. Default: the trace's.")
@click.option("--policy", type=_PolicyName(), multiple=True, help="Only this one; may be given again. Default: all.")
@_json_option
def replay(
    trace: Path, memory: list[tuple[str, MemoryRequest]], bundle: Path | None, policy: tuple[str, ...], as_json: bool
) -> None:
    """Say how often experts would be in memory, and what would be read, for a TRACE that `run --trace` recorded.

    Without prefetch, and for the tokens after the prompt.
    """
    from pocketmoe.bundle import Bundle
    from pocketmoe.profiles.replay import replay as replay_trace
    from pocketmoe.runtime.trace import read_trace
    from pocketmoe.tables import replay_table

    with ProgressBar() as bar:
        opened = Bundle.open(bundle) if bundle else None
        report = replay_trace(trace, read_trace(trace), memory, policy, bundle=opened, progress=bar)
    if as_json:
        _print_json(report)
    else:
        click.echo(replay_table(report))


@main.command()
@_json_option
def doctor(as_json: bool) -> None:
    """Look at this machine: CPU, memory, disk speed, and whether expert slots work on it."""
    from pocketmoe.profiles.doctor import advice, examine
    from pocketmoe.tables import doctor_table

    with ProgressBar() as bar:
        report = examine(Path(), bar)
    if as_json:
        _print_json(report)
    else:
        click.echo(doctor_table(report, advice(report)))


def _require(package: str, command: str) -> None:
    """Say what to install where only the runtime is. Raises BadInput."""
    from importlib.util import find_spec

    if not find_spec(package):
        raise BadInput(
            f"{command} needs {package}, which is not installed", "Install it with: pip install 'pocketmoe[export]'."
        )


def _say_written(bundle: Bundle) -> None:
    total = sum(entry.nbytes for entry in bundle.manifest.files.values())
    click.echo(f"Wrote {bundle.root} ({in_words(total)}).", err=True)
    for note in bundle.manifest.notes:
        click.echo(f"Note: {note}", err=True)


def _print_json(record: Any) -> None:
    from dataclasses import asdict

    click.echo(json.dumps(asdict(record), ensure_ascii=False))


if __name__ == "__main__":
    main()
