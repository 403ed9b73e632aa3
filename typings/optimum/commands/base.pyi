from argparse import ArgumentParser, Namespace
from typing import Any

class CommandInfo:
    name: str
    help: str
    subcommand_class: type[BaseOptimumCLICommand] | None
    def __init__(self, name: str, help: str, subcommand_class: type[BaseOptimumCLICommand] | None = None) -> None: ...  # noqa: A002

class BaseOptimumCLICommand:
    COMMAND: CommandInfo
    SUBCOMMANDS: tuple[CommandInfo, ...]
    parser: ArgumentParser
    args: Namespace | None
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    @staticmethod
    def parse_args(parser: ArgumentParser) -> None: ...
    def run(self) -> None: ...
