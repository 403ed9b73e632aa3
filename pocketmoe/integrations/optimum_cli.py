"""The subcommands of optimum-cli: `export pocketmoe`, and `pocketmoe quantize`, `push` and `pull`.

They take the options of the commands of `pocketmoe`, and run them: what these say, write and return is theirs.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any, ClassVar, cast

import click
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from pocketmoe.cli import main


def add_options(parser: ArgumentParser, command: click.Command) -> None:
    """Give a parser of optimum's the options of a command, as texts: the command reads them."""
    for parameter in command.params:
        if not isinstance(parameter, click.Option):
            continue
        flags = [*parameter.opts, *parameter.secondary_opts]
        text = (parameter.help or "").replace("%", "%%")
        if parameter.is_flag:
            parser.add_argument(*flags, dest=parameter.name, action="store_true", help=text)
        else:
            shown = parameter.metavar or parameter.type.name.upper()
            action = "append" if parameter.multiple else "store"
            parser.add_argument(
                *flags, dest=parameter.name, action=action, required=parameter.required, metavar=shown, help=text
            )


def given_options(arguments: Namespace, command: click.Command) -> list[str]:
    """What was given of them, as the command's own arguments."""
    words: list[str] = []
    for parameter in command.params:
        value: Any = getattr(arguments, str(parameter.name), None)
        if not isinstance(parameter, click.Option) or value is None or value is False:
            continue
        values = cast("list[Any]", value) if isinstance(value, list) else [value]
        for each in values:
            words += [parameter.opts[-1]] if each is True else [f"{_long(parameter)}={each}"]
    return words


def _long(option: click.Option) -> str:
    return next((name for name in option.opts if name.startswith("--")), option.opts[0])


class ExportPocketMoE(BaseOptimumCLICommand):
    """`optimum-cli export pocketmoe`, whose output is a positional argument as that of optimum's other exports."""

    COMMAND = CommandInfo(name="pocketmoe", help="Export a Mixture-of-Experts checkpoint to a PocketMoE bundle.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("-m", "--model", required=True, help="A directory with a checkpoint, or a hub id.")
        parser.add_argument("bundle_output", metavar="OUTPUT", help="Where the bundle goes.")
        add_options(parser, _without(main.commands["export"], "output"))

    def run(self) -> None:
        """Exit as `pocketmoe export` does."""
        found = given_options(self._given, _without(main.commands["export"], "output"))
        main(["export", *found, f"--output={self._given.bundle_output}", "--", self._given.model])

    @property
    def _given(self) -> Namespace:
        assert self.args is not None, "it runs with what was parsed"
        return self.args


def _without(command: click.Command, name: str) -> click.Command:
    """A command as if it had no such option."""
    return click.Command(command.name, params=[each for each in command.params if each.name != name])


class _Forwarded(BaseOptimumCLICommand):
    """A command of `pocketmoe` under its own name, with its own arguments."""

    _of: ClassVar[str]

    @classmethod
    def command(cls) -> click.Command:
        return main.commands[cls._of]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if not options.get("from_defaults_factory"):
            for parameter in self.command().params:
                if isinstance(parameter, click.Argument):
                    self.parser.add_argument(f"pocketmoe_{parameter.name}", metavar=parameter.make_metavar(_context()))
            add_options(self.parser, self.command())

    def run(self) -> None:
        """Exit as the command does."""
        assert self.args is not None, "it runs with what was parsed"
        positional = [
            getattr(self.args, f"pocketmoe_{parameter.name}")
            for parameter in self.command().params
            if isinstance(parameter, click.Argument)
        ]
        main([self._of, *given_options(self.args, self.command()), "--", *positional])


def _context() -> click.Context:
    return click.Context(main)


class Quantize(_Forwarded):
    """`optimum-cli pocketmoe quantize`."""

    _of = "quantize"


class Push(_Forwarded):
    """`optimum-cli pocketmoe push`."""

    _of = "push"


class Pull(_Forwarded):
    """`optimum-cli pocketmoe pull`."""

    _of = "pull"


class PocketMoECommands(BaseOptimumCLICommand):
    """`optimum-cli pocketmoe`."""

    COMMAND = CommandInfo(name="pocketmoe", help="Work on PocketMoE's bundles.")
    SUBCOMMANDS = (
        CommandInfo("quantize", "Write a bundle with smaller weights.", Quantize),
        CommandInfo("push", "Upload a bundle to the hub.", Push),
        CommandInfo("pull", "Download a bundle from the hub.", Pull),
    )
