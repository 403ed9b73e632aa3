"""What somebody types, line by line: in an editor where prompt_toolkit is there, plainly without, or from a pipe."""

# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec

import click

from pocketmoe.process import ReaderGone

ReadLine = Callable[[], str | None]  # None at the end; raises KeyboardInterrupt for Ctrl-C

PROMPT, MORE = "> ", ". "
_CONTINUED = "\\"


def open_lines() -> ReadLine:
    """A function that gives one text after the other. Call it before memory is planned: an editor takes some."""
    if not sys.stdin.isatty():
        return lambda: _joined(_from_pipe)
    if sys.stdout.isatty() and find_spec("prompt_toolkit"):
        return _editor()
    return lambda: _joined(_from_terminal)


def _joined(read: Callable[[str], str | None]) -> str | None:
    """A line, and those after it as long as each ends with a backslash."""
    lines = []
    while (line := read(MORE if lines else PROMPT)) is not None:
        lines.append(line.removesuffix(_CONTINUED))
        if not line.endswith(_CONTINUED):
            break
    return "\n".join(lines) if lines else None


def _from_pipe(prompt: str) -> str | None:  # noqa: ARG001 - nobody would see it
    line = sys.stdin.readline()
    return line.removesuffix("\n") if line else None


def _from_terminal(prompt: str) -> str | None:
    click.echo(prompt, nl=False, err=True)
    line = _from_pipe(prompt)
    if line is None:
        click.echo(err=True)
    return line


def _editor() -> ReadLine:
    """Enter sends; Alt-Enter, or Esc and Enter, begins a line; what is pasted stays together. History is not kept."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: PromptSession[str] = PromptSession(key_bindings=keys, prompt_continuation=MORE)

    def read() -> str | None:
        try:
            return session.prompt(PROMPT)
        except EOFError:
            return None
        except BrokenPipeError:
            raise ReaderGone from None

    return read
