"""Numbers, sizes and paths as users type them: refused here, before anything is loaded, where nothing can be meant."""

from __future__ import annotations

import math
import mmap
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pocketmoe.sizes import in_words, parse_share, parse_size

if TYPE_CHECKING:
    from pocketmoe.runtime.engine.memory_plan import MemoryRequest

_WHOLE = re.compile(r"[+-]?[0-9]{1,20}")
_DECIMAL = re.compile(r"[+-]?([0-9]{1,30}\.?[0-9]{0,30}|\.[0-9]{1,30})(e[+-]?[0-9]{1,4})?", re.IGNORECASE)
_DURATION = re.compile(r"([0-9]{1,7})([smh])")
_MOST_SHOWN = 40  # characters of a text that is refused


class Whole(click.IntRange):
    """A whole number in plain digits, within bounds on both sides."""

    def __init__(self, least: int, most: int) -> None:
        super().__init__(least, most)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        given = value
        if isinstance(given, str) and not _WHOLE.fullmatch(given):
            self.fail(f"{_shown(given)} is not a whole number", param, ctx)
        return super().convert(value, param, ctx)

    def _describe_range(self) -> str:
        return f"{self.min}<=x" if self.max is not None and self.max >= 1 << 20 else super()._describe_range()


class Threads(Whole):
    """A number of threads. More than there are processors only get into each other's way: then as many as those."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from pocketmoe.system.cpus import usable_cpus

        threads, most = super().convert(value, param, ctx), len(usable_cpus())
        if threads > most:
            click.echo(f"Note: {threads} threads are more than the {most} processors here; {most} are used.", err=True)
        return min(threads, most)


class Number(click.FloatRange):
    """A finite number within bounds on both sides: beyond them arithmetic overflows, and nobody means it."""

    def __init__(self, least: float, most: float, open_below: bool = False) -> None:
        super().__init__(least, most, min_open=open_below)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        given = value
        if isinstance(given, str) and not _DECIMAL.fullmatch(given):
            self.fail(f"{_shown(given)} is not a number", param, ctx)
        number = super().convert(value, param, ctx)
        if not math.isfinite(number) or 0 < abs(number) < sys.float_info.min:  # subnormal: its inverse is infinite
            self.fail(f"{_shown(value)} is not a number that can be reckoned with", param, ctx)
        return number


class UserPath(click.Path):
    """A place in the file system."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value) or "\0" in str(value):
            self.fail(f"{_shown(str(value))} is not a path", param, ctx)
        return super().convert(value, param, ctx)


class BundleName(UserPath):
    """A bundle: a directory, or a hub id, as it was typed: `./a/b` is never an id."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        super().convert(value, param, ctx)
        return str(value)


class Parameter(click.ParamType):  # pyright: ignore[reportMissingTypeArgument] ; generic in newer versions of click alone
    """What the package's own kinds of values derive from."""


class Duration(Parameter):
    """Seconds, as 90s, 10m or 2h."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if not isinstance(value, str):
            return value
        found = _DURATION.fullmatch(value)
        if not found or not int(found[1]):
            self.fail(f"{_shown(value)} is not a time: write 90s, 10m or 2h", param, ctx)
        return float(int(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]])


class ByteSize(Parameter):
    """So many bytes. `or_nothing`: 0 may be meant."""

    name = "SIZE"

    def __init__(self, or_nothing: bool = False) -> None:
        self._or_nothing = or_nothing

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if not isinstance(value, str):
            return value
        if self._or_nothing and value.strip() == "0":
            return 0
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class MemorySize(Parameter):
    """A budget for the whole process; more than there is gets a word on stderr."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> MemoryRequest:
        share, total = self.parse(value, param, ctx)
        from pocketmoe.runtime.engine.memory_plan import MemoryRequest

        return MemoryRequest(total, share)

    def parse(
        self, text: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float | None, int | None]:
        """The share of the experts, or the bytes."""
        try:
            share = parse_share(text)
            total = parse_size(text, or_share=True) if share is None else None
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if total is not None:
            say_beyond_machine(text.strip(), total)
        return share, total


class MemoryList(MemorySize):
    """Budgets, with how they were written; `words` stand for budgets that are found later."""

    name = "LIST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        parsed = [(text.strip(), self.parse(text, param, ctx)) for text in value.split(",")]
        from pocketmoe.runtime.engine.memory_plan import MemoryRequest

        return [(text, MemoryRequest(total, share)) for text, (share, total) in parsed]


class BudgetNames(MemorySize):
    """Budgets as they were written, by which `profile` tells which of them it has measured already."""

    name = "LIST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        texts = tuple(text.strip() for text in value.split(","))
        for text in texts:
            if text != "least":
                self.parse(text, param, ctx)
        return texts


class Rates(Parameter):
    """Bytes per second, in a list."""

    name = "LIST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return tuple(float(parse_size(text)) for text in value.split(","))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Users(Parameter):
    """Numbers of users at once, in a list."""

    name = "LIST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        numbers = [part.strip() for part in value.split(",")]
        if not all(_WHOLE.fullmatch(number) and 0 < int(number) <= 256 for number in numbers):
            self.fail(f"{_shown(value)} is not a list of numbers of users, such as 1,8", param, ctx)
        return tuple(int(number) for number in numbers)


class Workers(Parameter):
    """Threads, or Ray."""

    name = "N|ray|ray://HOST:PORT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        text = str(value)
        number = int(text) if _WHOLE.fullmatch(text) else 0
        if 0 < number <= MOST_THREADS:
            return number
        if text != "ray" and not (text.startswith("ray://") and text.isprintable() and len(text) > len("ray://")):
            self.fail(f"{_shown(text)} is neither a number of threads, ray, nor ray://HOST:PORT", param, ctx)
        return text


MOST_THREADS = 1024
MOST_TOKENS = (1 << 31) - 1
TOKENS = Whole(1, MOST_TOKENS)
THREADS = Threads(1, MOST_THREADS)
SEED = Whole(0, (1 << 64) - 1)
SHARE = Number(0, 1)
PART = Number(1e-6, 1)  # a share that something is divided by
PATH = UserPath()
BUNDLE = BundleName()


def say_beyond_machine(text: str, nbytes: int) -> None:
    """A word where a budget is more than this machine has, or than its cgroup lets this process take."""
    from pocketmoe.runtime.memory.budget import machine_bytes

    most = machine_bytes()
    if nbytes >= most + mmap.PAGESIZE:  # a cgroup's limit is in whole pages
        click.echo(f"Note: {text} is more than this process can have here: {in_words(most)}.", err=True)


def _shown(text: object) -> str:
    shown = str(text)
    return ascii(shown if len(shown) <= _MOST_SHOWN else f"{shown[:_MOST_SHOWN]}...")
