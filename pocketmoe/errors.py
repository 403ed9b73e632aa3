"""Every error a user can meet: what happened, what to do next, and the process's exit code.

    PocketMoEError              1   a bug, or something nobody foresaw
      BadInput                  3   a checkpoint, bundle, prompt or file that cannot be used
        UnknownName             2   a device, scheme, cloud or GPU that was asked for by a name which none has
        ContextFull             3   a prompt or conversation that leaves no room for an answer
        UnsupportedModel        3   a checkpoint that the export cannot capture
        DamagedFile             3   bytes that do not match their recorded hash or format
          GraphRefused          3   a graph that ONNX Runtime refuses to load or to compute
        OutputError             3   a place that cannot be written (disk full, not a bundle)
      LimitReached              3   the machine's limits on open files or memory maps are reached
      BudgetTooSmall            4   the memory budget cannot be met; names the least that would do
      OverBudget                4   something took, or asked for, more memory than the budget has
      SizeTooSmall              4   a bundle cannot be made as small as was asked for; names the least that can
      NothingFits               4   no scheme and budget of a model fit a device, or reach a speed
      GateFailed                5   a quality gate does not hold; names the rows that broke

Usage errors (exit 2) are click's. Foreign exceptions are translated where they enter, with the file's name and a
remedy; what got through none the less, cli.py translates by one table.
"""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_FROM_CLONE = "pip install '.[{}]', in a clone of the project"
_LONGEST = 1500  # characters of a message: what a file says of itself may be megabytes


def printable(text: str, instead: str = "?") -> str:
    """A text of foreign making, fit for a terminal and for a line."""
    return "".join(c if c.isprintable() else instead for c in text)


def first_line(error: BaseException, most: int = 160) -> str:
    """The first line of what a library says, cut after `most` characters; the error's class where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0][:most] if text else type(error).__name__


def install(extra: str) -> str:
    """The remedy where an extra is not installed: the line that adds it to this installation, wherever that is from."""
    from importlib import metadata  # takes 10 ms

    try:
        noted = metadata.distribution("pocketmoe").read_text("direct_url.json")  # PEP 610: not for what an index had
        line = _pip_install(extra, json.loads(noted)) if noted else f"pip install 'pocketmoe[{extra}]'"
    except (metadata.PackageNotFoundError, LookupError, TypeError, ValueError, AttributeError):  # no pip's installation
        line = _FROM_CLONE.format(extra)
    return f"Install what it needs: {line}."


def require(package: str, what: str, extra: str = "export") -> None:
    """Say what to install where only the runtime is. Raises BadInput."""
    from importlib.util import find_spec

    if not find_spec(package):
        raise BadInput(f"{what} needs {package}, which is not installed", install(extra))


def _pip_install(extra: str, origin: dict[str, Any]) -> str:
    url: str = origin["url"]
    folder, vcs = origin.get("dir_info"), origin.get("vcs_info")
    if not url.startswith("file:"):
        kind = f"{vcs['vcs']}+" if vcs else ""
        return f"pip install {shlex.quote(f'pocketmoe[{extra}] @ {kind}{url}')}"
    path = unquote(urlsplit(url).path)
    if not Path(path).exists():  # a wheel that was removed since
        return _FROM_CLONE.format(extra)
    return f"pip install {'-e ' if folder and folder.get('editable') else ''}{shlex.quote(f'{path}[{extra}]')}"


class PocketMoEError(Exception):
    """An error with one line for the user and one thing to do about it."""

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy

    def __reduce__(self) -> tuple[Any, ...]:
        """From other processes an error comes back whole, whatever its class is made from."""
        return _restore, (type(self), self.args, self.__dict__)

    def one_line(self) -> str:
        """The message and the remedy as one line of printable text, whatever a hostile file put into them."""
        return " ".join(filter(None, self.in_parts()))

    def in_parts(self) -> tuple[str, str]:
        """The two apart, in the same text."""
        text = " ".join(str(self).split()).rstrip(".")
        text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} (and so on)"
        return printable(f"{text}."), printable(" ".join(self.remedy.split()))


class BadInput(PocketMoEError):
    """A checkpoint, bundle, prompt or file that cannot be used as it is."""

    exit_code = 3


class UnknownName(BadInput):
    """Something was asked for by a name that nothing has: those that are most alike, and all that there are."""

    exit_code = 2

    def __init__(self, what: str, name: str, known: Iterable[str], more: str = "") -> None:
        names = list(known)
        by_lower = {known.lower(): known for known in reversed(names)}
        alike = [by_lower[found] for found in difflib.get_close_matches(name.lower(), by_lower, cutoff=0.5)]
        meant = f"Did you mean {' or '.join(alike)}? " if alike else ""
        super().__init__(f"no {what} is named {name!r}", f"{meant}Known are: {', '.join(names)}{more}.")


class ContextFull(BadInput):
    """A prompt, or a conversation, that leaves no room for an answer."""

    def __init__(self, tokens: int, context: int, holder: str = "the model's context") -> None:
        super().__init__(f"the prompt has {tokens} tokens, {holder} holds {context}", "Shorten the prompt.")
        self.tokens = tokens
        self.context = context


class UnsupportedModel(BadInput):
    """A checkpoint whose architecture the export cannot capture."""


class DamagedFile(BadInput):
    """A file whose bytes do not match their recorded hash or format."""

    def __init__(self, path: Path | str, what: str, remedy: str = "") -> None:
        super().__init__(f"{path}: {what}", remedy or "Export or copy the bundle again.")
        self.path = Path(path)


class GraphRefused(DamagedFile):
    """A graph that ONNX Runtime refuses to load or to compute."""


class OutputError(BadInput):
    """A place that cannot be written to."""


class LimitReached(PocketMoEError):
    """Something that the system limits, other than memory, has run out."""

    exit_code = 3


def _few_or_megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.0f} MB" if nbytes >= 1e6 else f"{nbytes} bytes"


class BudgetTooSmall(PocketMoEError):
    """The memory budget cannot be met."""

    exit_code = 4

    def __init__(self, budget_bytes: int, least_bytes: int) -> None:
        least_mb = -(-least_bytes // 10**6)
        super().__init__(
            f"the memory budget of {_few_or_megabytes(budget_bytes)} cannot be met",
            f"The least that would do is {least_mb} MB: --memory {least_mb}MB.",
        )
        self.budget_bytes = budget_bytes
        self.least_bytes = least_mb * 10**6


class OverBudget(PocketMoEError):
    """Something took more memory than the budget allows, or asked for more and did not get it."""

    exit_code = 4

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(
            message, remedy or "Give more by --memory; do not, for a bundle that you have no reason to trust."
        )


class SizeTooSmall(PocketMoEError):
    """A bundle cannot be made as small as was asked for."""

    exit_code = 4

    def __init__(
        self, limit_bytes: int | None, least_bytes: int, limit_fetched: float | None, least_fetched: float
    ) -> None:
        if limit_bytes is not None and limit_bytes < least_bytes:
            wanted, least, option = limit_bytes, least_bytes, "--size-budget"
        else:
            wanted, least, option = int(limit_fetched or 0), int(least_fetched), "--fetch-budget"
        least_kb = -(-least // 1000)
        super().__init__(
            f"{option} {wanted / 1e6:.3f}MB cannot be met",
            f"The least that would do is {option} {least_kb / 1000:.3f}MB.",
        )
        self.least_bytes = 1000 * least_kb


class NothingFits(PocketMoEError):
    """No scheme and budget of a model fit a device, or reach the speed that was asked for."""

    exit_code = 4


class GateFailed(PocketMoEError):
    """A quality gate does not hold."""

    exit_code = 5


def _restore(kind: type[PocketMoEError], args: tuple[Any, ...], fields: dict[str, Any]) -> PocketMoEError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error
