"""The command line. Data goes to stdout, all else to stderr; imports of what is heavy wait for their command."""

from __future__ import annotations

from typing import Any

import click

from pocketmoe import __version__
from pocketmoe.commands import compare, evaluate, export, inspect, plan, profile, quantize, run
from pocketmoe.errors import OverBudget, PocketMoEError
from pocketmoe.signals import Terminated, terminable

_EXIT_CODES = (
    "Exit codes: 0 ok, 1 bug, 2 usage, 3 bad input, 4 the memory budget cannot be met, 5 a quality gate failed."
)


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            with terminable():
                return super().invoke(ctx)
        except PocketMoEError as error:  # the one place an error becomes a line and an exit code
            click.echo(f"Error: {error.one_line()}", err=True)
            ctx.exit(error.exit_code)
        except MemoryError:
            click.echo("Error: there is not enough memory for this. Give more by --memory, or free some.", err=True)
            ctx.exit(OverBudget.exit_code)
        except KeyboardInterrupt:
            click.echo("\nInterrupted.", err=True)
            ctx.exit(130)
        except Terminated as signal:
            ctx.exit(signal.exit_code)


@click.group(cls=_Commands, epilog=_EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Run Mixture-of-Experts language models on machines too small for them."""


_COMMANDS = (
    export.export,
    quantize.quantize,
    export.export_portable,
    run.run,
    evaluate.evaluate,
    run.replay,
    inspect.inspect,
    inspect.verify,
    inspect.doctor,
    profile.profile,
    profile.measure,
    compare.compare,
    plan.plan,
)
for _command in _COMMANDS:
    main.add_command(_command)


if __name__ == "__main__":
    main()
