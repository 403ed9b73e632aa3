"""How one answer is written and read: the model's dialect, the tools it is given, whether it has to call one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pocketmoe.errors import BadInput
from pocketmoe.grammar.constraint import Constraint, after_reasoning, text_until
from pocketmoe.jsonfile import is_object
from pocketmoe.tools import harmony
from pocketmoe.tools.calls import Parsed, Part, Tool, ToolCall, read_tools
from pocketmoe.tools.families import Dialect, Parser
from pocketmoe.tools.forced import Term, forced_calls

AUTO, NONE, REQUIRED = "auto", "none", "required"
_HOLDS = ("json_schema", "regex", "grammar")  # options, each of which an answer's content is held to


@dataclass(frozen=True)
class Speech:
    """`given`: the tools as the template takes them. `only`: the name of the one that has to be called."""

    dialect: Dialect = field(default_factory=Dialect)
    tools: tuple[Tool, ...] = ()
    given: tuple[Any, ...] = ()
    has_to_call: bool = False
    only: str | None = None
    several: bool = True  # calls in one answer
    content_held: bool = False  # to a form: calls come in the place of content, not after it

    @property
    def marks(self) -> frozenset[str]:
        """Special tokens that have to be seen in an answer."""
        return self.dialect.marks if self.tools or self.dialect.is_harmony else frozenset(self.dialect.thinks or ())

    @property
    def variables(self) -> dict[str, Any]:
        """For the chat template."""
        return {"tools": list(self.given)} if self.given else {}

    def parser(self, begun: bool = False) -> Parser:
        """Reads one answer as it arrives. `begun`: the prompt has opened the reasoning."""
        parser = self.dialect.parser(self.tools, begun=begun, calls_first=self.content_held)
        return parser if self.several or not self.tools else _OneCall(parser)

    def parse(self, text: str, begun: bool = False) -> Parsed:
        """A whole answer."""
        parser = self.parser(begun)
        return Parsed.of([*parser.push(text), *parser.finish()])

    def held(self, content: Constraint | None, term: Term) -> Constraint | None:
        """What an answer is held to: calls, where it has to be some; else what its content is held to, or calls."""
        if not self.tools or not (self.has_to_call or content):
            return content
        wanted = [tool for tool in self.tools if self.only in (None, tool.name)]
        calls = forced_calls(self.dialect, wanted, term, several=self.several)
        return replace(content, calls=calls) if content and not self.has_to_call else Constraint("tool_calls", calls)


class _OneCall:
    """Reads an answer up to its first call; what the model goes on to say is nobody's."""

    def __init__(self, parser: Parser) -> None:
        self._parser, self._called = parser, False

    def push(self, piece: str) -> list[Part]:
        return self._until_call(self._parser.push(piece))

    def finish(self) -> list[Part]:
        return self._until_call(self._parser.finish())

    def _until_call(self, parts: list[Part]) -> list[Part]:
        if self._called:
            return []
        for number, part in enumerate(parts):
            if isinstance(part, ToolCall):
                self._called = True
                return parts[: number + 1]
        return parts


def speech(dialect: Dialect, options: Mapping[str, Any]) -> Speech:
    """What the options `tools`, `tool_choice` and `parallel_tool_calls` ask for. Raises BadInput.

    A choice is a word, a tool's name, or an object that names one as OpenAI has it, which is never taken for a word.
    """
    word, only = _choice(options.get("tool_choice") or AUTO)
    given = tuple(options.get("tools") or ())
    if word == NONE or not given:
        if word == REQUIRED:
            raise BadInput("there are no tools to choose from", "Give some.")
        return Speech(dialect)
    tools = tuple(read_tools(given))
    if only is not None and all(tool.name != only for tool in tools):
        raise BadInput(f"there is no tool {only!r}", "Choose one of the tools.")
    if dialect.family is None:
        raise BadInput("this model's chat template knows no tools", "Leave them out.")
    return Speech(
        dialect, tools, given,
        has_to_call=word == REQUIRED,
        only=only,
        several=options.get("parallel_tool_calls") is not False,
        content_held=any(options.get(name) is not None for name in _HOLDS),
    )  # fmt: skip


def _choice(given: object) -> tuple[str, str | None]:
    """A word, and the name of a tool. Raises BadInput."""
    name: object = given
    if is_object(given):
        function = given.get("function", given)
        name = function.get("name") if is_object(function) else None
    elif given in (AUTO, NONE, REQUIRED):
        return str(given), None
    if not isinstance(name, str):
        raise BadInput("the tool choice is none", "Give auto, none, required, or a tool's name.")
    return REQUIRED, name


def with_free_reasoning(held: Constraint, dialect: Dialect, rendered: str | None, term: Term) -> Constraint:
    """The same for what follows a model's reasoning, which is free. `rendered`: the prompt by the chat template."""
    if rendered is None:
        return held
    if dialect.is_harmony:
        channel, message = term(harmony.CHANNEL), term(harmony.MESSAGE)
        final = "" if held.kind == "tool_calls" else f'{channel} "final" {message}'
        return replace(held, before=_analysis(term), opening=final)
    end = rendered.rstrip()
    if dialect.thinks is None or end.endswith(dialect.thinks[1]):
        return held
    opening, closing = map(term, dialect.thinks)
    return after_reasoning(held, opening, closing, begun=end.endswith(dialect.thinks[0]))


def _analysis(term: Term) -> str:
    channel, message, start = term(harmony.CHANNEL), term(harmony.MESSAGE), term(harmony.START)
    end = term(harmony.ENDS[0])
    before = f'before: ({channel} "analysis" {message} thought {start} "assistant")?'
    return f"{before}\n{text_until(end, 'thought')}"
