"""The command line. Data goes to stdout, all else to stderr; imports of what is heavy wait for their command."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import platform
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import click

from pocketmoe import __version__, process
from pocketmoe.commands.chat import chat
from pocketmoe.commands.compare import compare
from pocketmoe.commands.doctor import doctor
from pocketmoe.commands.evaluate import evaluate
from pocketmoe.commands.export import export
from pocketmoe.commands.export_portable import export_portable
from pocketmoe.commands.inspect import inspect
from pocketmoe.commands.measure import measure
from pocketmoe.commands.pack import pack
from pocketmoe.commands.packed import packed
from pocketmoe.commands.plan import plan
from pocketmoe.commands.prefix_cache import prefix_cache
from pocketmoe.commands.profile import profile
from pocketmoe.commands.pull import pull
from pocketmoe.commands.push import push
from pocketmoe.commands.quantize import quantize
from pocketmoe.commands.replay import replay
from pocketmoe.commands.run import run
from pocketmoe.commands.serve import serve
from pocketmoe.commands.verify import verify
from pocketmoe.errors import BadInput, OutputError, OverBudget, PocketMoEError

_EXIT_CODES = (
    "Exit codes: 0 ok, 1 bug, 2 usage, 3 bad input, 4 the memory budget cannot be met, 5 a quality gate failed, "
    "130 interrupted. With --json an error is one JSON object on stderr: error, remedy, exit_code."
)
_WANTS_TRACEBACK = "POCKETMOE_TRACEBACK"


class _Commands(click.Group):
    """The one place where what a command raises becomes a line and an exit code."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        def command() -> Any:
            return super(_Commands, self).main(args, prog_name, complete_var, standalone_mode=False, **extra)

        if not standalone_mode:
            return command()
        as_json = _wants_json(sys.argv[1:] if args is None else args)
        if sys.stdout is not sys.__stdout__:  # a caller inside this process, such as a test, has streams of its own
            sys.exit(_exit_code(command, as_json))
        process.prepare_streams()
        process.unwind_on_signals()
        code = _exit_code(command, as_json)
        process.leave_on_signals()
        sys.exit(process.settle(code))

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """In the order in which they were added, which is that of the work."""
        return list(self.commands)


def _wants_json(args: Sequence[str]) -> bool:
    """Whether errors are to be JSON too: by the command line as it stands, which may be what is wrong."""
    return any(arg in ("--json", "--jsonl") for arg in itertools.takewhile(lambda arg: arg != "--", args))


def _exit_code(command: Callable[[], Any], as_json: bool) -> int:
    """Run a command to its exit code; what it raises is said on stderr."""
    try:
        return _told(command, as_json)
    except KeyboardInterrupt:  # a second Ctrl-C, or one while an error is printed
        return 130
    except SystemExit as done:
        return _code(done)


def _told(command: Callable[[], Any], as_json: bool) -> int:
    try:
        done = command()
        sys.stdout.flush()
        return done if isinstance(done, int) else 0
    except process.Stopped as stopped:
        return _tell(f"\n{stopped.word}", _Error(stopped.word, "", _code(stopped)), as_json)
    except SystemExit as done:
        return _code(done)
    except (KeyboardInterrupt, click.Abort):  # click turns the one into the other, and ends the line
        return _tell("Interrupted.", _Error("Interrupted.", "", 130), as_json)
    except click.ClickException as error:
        usage = _Error(error.format_message(), "--help says what can be given.", error.exit_code)
        return _tell(error.show, usage, as_json)
    except BaseException as error:  # noqa: BLE001 - the boundary; native libraries panic beside Exception
        if os.environ.get(_WANTS_TRACEBACK):
            click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
        known = error if isinstance(error, PocketMoEError) else _translate(error)
        return _tell(f"Error: {known.one_line()}", _Error(*known.in_parts(), known.exit_code), as_json)


class _Error(NamedTuple):
    """What programs are told of an error."""

    error: str
    remedy: str
    exit_code: int


def _tell(lines: str | Callable[[], None], error: _Error, as_json: bool) -> int:
    """Say on stderr what ended a command, in lines for people or as one object in a line; the exit code."""
    if as_json:
        click.echo(json.dumps(error._asdict()), err=True)
    elif isinstance(lines, str):
        click.echo(lines, err=True)
    else:
        lines()
    return error.exit_code


def _code(done: SystemExit) -> int:
    return done.code if isinstance(done.code, int) else 0 if done.code is None else 1


def _translate(error: BaseException) -> PocketMoEError:
    """An exception of Python's or of a library's that no module has translated, as one of our errors."""
    words = str(error) or type(error).__name__
    if isinstance(error, OSError):
        return _of_the_system(error)
    if isinstance(error, MemoryError):
        return OverBudget(f"there is not enough memory for this ({words[:200]})")
    if isinstance(error, RecursionError):
        return BadInput("a file is nested too deeply to be read", "Use a file from where it was published.")
    if isinstance(error, UnicodeError):
        return BadInput(f"a text is not in the encoding that it should be in ({words[:200]})", "Convert it to UTF-8.")
    if type(error).__module__.split(".")[0] == "psutil":
        return BadInput(f"this process cannot look at itself ({words[:200]})", "Mount /proc.")
    if not isinstance(error, Exception):
        return BadInput(f"a library gave up on a file ({words[:200]})", "Use a file from where it was published.")
    return _bug(error, words)


def _of_the_system(error: OSError) -> PocketMoEError:
    what = error.strerror or str(error) or type(error).__name__
    where = f"{error.filename}: " if isinstance(error.filename, str) else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
        return OutputError(f"{where}cannot be written ({what})", "Free some space, or choose another place.")
    if where.startswith(("/proc/self/", "/proc/meminfo", "/proc/stat", "/proc/cpuinfo")):
        return BadInput(f"{where}{what}", "Mount /proc: memory is measured there.")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return BadInput(f"{where}{what}", "Raise the limit of open files: ulimit -n.")
    return BadInput(f"{where}{what}", "Check that place, its permissions and its disk.")


def _bug(error: Exception, words: str) -> PocketMoEError:
    last = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" in {os.path.basename(last[0].filename)}:{last[0].lineno}" if last else ""  # noqa: PTH119 - a name for people
    return PocketMoEError(
        f"this is a bug: {type(error).__name__}{where}: {words[:300]}",
        f"Please report it with the traceback, which {_WANTS_TRACEBACK}=1 shows.",
    )


def _print_versions(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    """The version; then those of Python and of what is installed of the packages that are declared, tests' left out."""
    if not wanted or ctx.resilient_parsing:
        return
    from importlib import metadata  # takes 10 ms

    click.echo(f"pocketmoe, version {__version__}")
    found = [f"Python {platform.python_version()}"]
    for requirement in _declared():
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    click.echo(", ".join(dict.fromkeys(found)))
    ctx.exit()


def _declared() -> list[str]:
    """What the package requires, with its extras; nothing where it runs without being installed."""
    from importlib import metadata

    try:
        declared = metadata.requires("pocketmoe") or []
    except metadata.PackageNotFoundError:
        return []
    return [line for line in declared if not re.search(r"extra == ['\"](?:dev|mutate)['\"]", line)]


@click.group(cls=_Commands, epilog=_EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_versions,
    help="Show the version, and those of what it stands on, and exit.",
)
def main() -> None:
    """Run Mixture-of-Experts language models on machines too small for them."""


for _command in (
    export,
    quantize,
    run,
    chat,
    serve,
    evaluate,
    profile,
    compare,
    plan,
    inspect,
    verify,
    pull,
    push,
    prefix_cache,
    doctor,
    replay,
    pack,
    packed,
    export_portable,
    measure,
):
    main.add_command(_command)


if __name__ == "__main__":
    main()
