"""The loop of `pocketmoe chat`: what is typed goes to the model or is a command; answers come as they are made.

Answers go to stdout, all else to stderr, so that a pipe gets answers alone.
"""

# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false
# pyright: reportArgumentType=false
# (click's ParamType is generic in newer versions alone)

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import click

from pocketmoe.bundle.reader import Bundle
from pocketmoe.chat_template.template import ChatTemplate
from pocketmoe.console.lines import ReadLine
from pocketmoe.console.progress import ProgressBar
from pocketmoe.console.sampling import settings, template_variable
from pocketmoe.errors import BadInput, ContextFull
from pocketmoe.runtime.conversation import Chat, Generation, Stream, read_conversation
from pocketmoe.runtime.model import Model
from pocketmoe.runtime.sampling import Sampling
from pocketmoe.sizes import in_words, peak_in_words
from pocketmoe.tools.calls import Part, ToolCall

_OFFERS = (
    "Nothing was dropped. /undo takes back the last turn, /reset begins anew, /save FILE keeps the text; "
    "--context N gives more room next time, up to {limit} tokens."
)


_TEMPLATE = "template."  # before a variable's name


def refuse_without_template(root: Path) -> None:
    """Raises BadInput for a bundle that takes no turns, before it is packed and loaded."""
    if ChatTemplate.open(Bundle.open(root)) is None:
        raise BadInput(f"{root} has no chat template", "It goes on with texts instead: pocketmoe run.")


class _StoppedByUser(Exception):
    """Ctrl-C while a prompt was being computed."""


class ChatLoop:
    """One conversation in the terminal."""

    def __init__(self, model: Model, chat: Chat, read: ReadLine, width: int) -> None:
        """`width`: of the terminal, in columns."""
        self._model, self._chat, self._read, self._width = model, chat, read, width
        self._last: Generation | None = None
        self._said: str | None = None  # last, and perhaps not answered
        self._stopping = False

    def run(self) -> None:
        """Until /quit or the end of what is read."""
        _say(f"{self._model.bundle.name}, {self._model.context_length} tokens of context, {self._way}. /help helps.")
        while (line := self._next()) is not None:
            try:
                if line.startswith("/"):
                    if not self._command(line):
                        return
                elif line.strip():
                    self._answer(line)
            except ContextFull as full:
                _say(f"The conversation has {full.tokens} tokens, the context holds {full.context}. {self._offers}")
            except BadInput as error:
                _say(error.one_line())

    @property
    def _way(self) -> str:
        """How tokens are chosen."""
        now, unchanged = asdict(self._sampling), asdict(Sampling())
        changed = [f"{name} {value}" for name, value in now.items() if value != unchanged[name]]
        return ", ".join(changed) or "greedy"

    @property
    def _sampling(self) -> Sampling:
        chosen = {name: value for name, value in self._chat.options.items() if name in settings()}
        return replace(self._model.sampling, **chosen)

    @property
    def _offers(self) -> str:
        return _OFFERS.format(limit=self._model.bundle.manifest.model.context_length)

    def _next(self) -> str | None:
        while True:
            try:
                return self._read()
            except KeyboardInterrupt:
                _say("(/quit or Ctrl-D leaves)")

    def _answer(self, text: str) -> None:
        self._said = text
        with ProgressBar() as bar, self._stopped_by_ctrl_c():

            def on_prompt(done: int, total: int) -> None:
                bar("reading the prompt", done, total)
                if self._stopping:
                    raise _StoppedByUser

            try:
                with self._chat.stream(text, on_prompt=on_prompt) as stream:
                    for part in self._parts(stream):
                        bar.clear()
                        _show(part)
            except _StoppedByUser:
                _say("Stopped before the answer; /retry asks again.")
                return
        click.echo()
        if stream.has_result:
            self._last = stream.result
            _say(figures(self._last, self._width))
            if self._last.stop_reason == "context":
                _say(f"The context is full: the answer ends at {self._last.context_used} tokens. {self._offers}")

    def _parts(self, stream: Stream) -> Iterator[Part]:
        """Reasoning and answer, until Ctrl-C."""
        known = stream.so_far
        parser = known.speech.parser(known.reasoning_begun)
        for piece in stream:
            yield from parser.push(piece)
            if self._stopping:
                break
        yield from parser.finish()

    @contextlib.contextmanager
    def _stopped_by_ctrl_c(self) -> Generator[None]:
        """Ctrl-C stops the answer at its next token. A second one does what Ctrl-C does elsewhere."""
        self._stopping = False
        before = signal.getsignal(signal.SIGINT)

        def stop(number: int, frame: FrameType | None) -> None:
            if self._stopping and callable(before):
                before(number, frame)
            self._stopping = True

        if before != signal.SIG_IGN:
            signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _command(self, line: str) -> bool:
        """Do what a line that begins with / says; False to leave."""
        name, _, rest = line[1:].partition(" ")
        if name in ("quit", "exit"):
            return False
        commands = self._commands()
        if name not in commands:
            raise BadInput(f"there is no /{name[:20]}", "/help lists what there is.")
        commands[name][0](rest.strip())
        return True

    def _commands(self) -> dict[str, tuple[Callable[[str], None], str]]:
        return {
            "help": (self._help, "this list"),
            "system": (self._system, "[TEXT]: show or set what the model is told first"),
            "reset": (lambda _: self._reset(), "forget the conversation, but for that"),
            "undo": (lambda _: self._undo(), "take back the last turn"),
            "retry": (lambda _: self._retry(), "ask the last question again"),
            "save": (self._save, "FILE: write the conversation, for you alone to read"),
            "load": (self._load, "FILE: go on from a saved conversation"),
            "set": (
                self._set,
                "[NAME VALUE]: how tokens are chosen, max_tokens, and template.NAME for the chat template",
            ),
            "stats": (lambda _: self._stats(), "all figures of the last answer"),
            "memory": (lambda _: self._memory(), "what the memory is promised to"),
            "quit": (lambda _: None, "leave; so does Ctrl-D. Ctrl-C stops an answer"),
        }

    def _help(self, _: str) -> None:
        for name, (_call, what) in self._commands().items():
            _say(f"/{name} {what}" if what.startswith(("[", "FILE")) else f"/{name}: {what}")
        _say("Alt-Enter, or a backslash at the end of a line, goes on in the next line.")

    def _system(self, text: str) -> None:
        messages = self._chat.messages
        has_one = bool(messages) and messages[0]["role"] == "system"
        if text:
            messages[:has_one] = [{"role": "system", "content": text}]
        _say(str(messages[0]["content"]) if text or has_one else "(nothing)")

    def _reset(self) -> None:
        self._chat.reset()
        _say("The conversation begins anew.")

    def _undo(self) -> None:
        text = self._chat.undo()
        _say("There is nothing to take back." if text is None else f"Took back: {text[:60]}")

    def _retry(self) -> None:
        last = self._chat.messages[-2:]
        answered = len(last) == 2 and last[0]["content"] == self._said
        text = self._chat.undo() if answered or self._said is None else self._said
        if text is None:
            raise BadInput("nothing was asked", "Ask first.")
        self._answer(text)

    def _save(self, name: str) -> None:
        path = _path(name)
        if path.exists():
            read_conversation(path)  # a file that is something else is not replaced
        self._chat.save(path)
        _say(f"Saved to {path}.")

    def _load(self, name: str) -> None:
        self._chat.load(_path(name))
        _say(f"{len(self._chat.messages)} messages.")

    def _set(self, rest: str) -> None:
        options = self._chat.options
        kinds = {**settings(), "max_tokens": click.IntRange(1)}
        name, _, value = rest.partition(" ")
        if name.startswith(_TEMPLATE):
            self._set_template(name.removeprefix(_TEMPLATE), value.strip())
        elif name:
            if name not in kinds:
                raise BadInput(f"there is no setting {name[:40]!r}", f"There are: {', '.join(kinds)}, template.NAME.")
            try:
                new = kinds[name].convert(value.strip(), None, None)
            except click.UsageError as error:
                raise BadInput(error.format_message()) from error
            replace(self._sampling, **{name: new} if name in settings() else {})  # refuses what cannot be
            options[name] = new
        chosen = {name: value for name, value in options.items() if name in settings()}
        now: dict[str, Any] = {
            **asdict(replace(self._model.sampling, **chosen)),
            "max_tokens": options.get("max_tokens"),
        }
        said = [f"{name} {value}" for name, value in now.items() if name in kinds]
        said += [f"{_TEMPLATE}{name} {json.dumps(value)}" for name, value in options.get("template", {}).items()]
        _say(", ".join(said))

    def _set_template(self, name: str, text: str) -> None:
        """Give the chat template a variable, or with no text leave it out again."""
        variables = dict(self._chat.options.get("template", {}))
        try:
            name, value = template_variable(name, text)
        except ValueError as error:
            raise BadInput(str(error), "Say, for example, /set template.enable_thinking false.") from error
        if not self._model.template_mentions(name):
            raise BadInput(f"this model's chat template has no {name[:40]}", "What it has is in the bundle's template.")
        if text:
            variables[name] = value
        else:
            variables.pop(name, None)
        self._chat.options["template"] = variables

    def _stats(self) -> None:
        if self._last is None:
            raise BadInput("there was no answer yet", "Ask first.")
        for field in fields(self._last):
            value = getattr(self._last, field.name)
            if isinstance(value, float):
                _say(f"{field.name} {value:.3f}")
            elif isinstance(value, (str, int)) and field.name != "text":
                _say(f"{field.name} {value}")

    def _memory(self) -> None:
        for name, nbytes in self._model.memory.items():
            _say(f"{name} {in_words(nbytes)}")


def figures(result: Generation, width: int) -> str:
    """What an answer took, in a line; shorter where the terminal is narrow."""
    rate = f"{result.decode_tokens_per_s:.1f}" if result.decode_tokens_per_s else "-"
    hits = f"{result.expert_hit_rate:.0%}" if result.expert_hit_rate is not None else "-"
    peak, budget = result.peak_memory_bytes, result.memory_budget_bytes
    context = f"{result.context_used} of {result.context_length}"
    line = (
        f"[{rate} tokens/s, first after {result.ttft_s:.1f} s, hits {hits}, memory {peak_in_words(peak)} of "
        f"{in_words(budget)}, context {context}]"
    )
    if len(line) < width:
        return line
    return f"[{rate} t/s, hits {hits}, {peak / 1e6:.0f}/{budget / 1e6:.0f} MB, {context}]"


def _show(part: Part) -> None:
    """The answer on stdout; reasoning, dim, on stderr."""
    if isinstance(part, ToolCall):  # of a model that was given no tools
        click.echo(f"{part.name}({part.arguments})", nl=False)
    elif part.kind == "reasoning":
        click.secho(part.text, nl=False, err=True, dim=True)
    else:
        click.echo(part.text, nl=False)


def _say(text: str) -> None:
    click.echo(text, err=True)


def _path(name: str) -> Path:
    if not name:
        raise BadInput("which file?", "Say /save FILE.")
    return Path(name).expanduser()
