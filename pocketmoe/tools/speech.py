"""How one answer is written and read: the model's dialect, the tools it is given, whether it has to call one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pocketmoe.errors import BadInput
from pocketmoe.grammar.constraint import Constraint, after_reasoning, text_until
from pocketmoe.tools import harmony
from pocketmoe.tools.calls import Parsed, Tool, read_tools
from pocketmoe.tools.families import Dialect, Parser
from pocketmoe.tools.forced import Term, forced_calls

AUTO, NONE, REQUIRED = "auto", "none", "required"


@dataclass(frozen=True)
class Speech:
    """`given`: the tools as the template takes them. `choice`: auto, required, or the name of the tool to be called."""

    dialect: Dialect = field(default_factory=Dialect)
    tools: tuple[Tool, ...] = ()
    given: tuple[Any, ...] = ()
    choice: str = AUTO
    several: bool = True  # calls in one answer, where they are forced

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
        return self.dialect.parser(self.tools, begun=begun)

    def parse(self, text: str, begun: bool = False) -> Parsed:
        """A whole answer."""
        return self.dialect.parse([text], self.tools, begun=begun)

    def held(self, otherwise: Constraint | None, term: Term) -> Constraint | None:
        """What holds an answer to calls, where it has to be some; else `otherwise`. Raises BadInput for both."""
        if self.choice == AUTO:
            return otherwise
        if otherwise:
            raise BadInput(f"an answer that has to be a call cannot be held to a {otherwise.kind}", "Choose one.")
        wanted = [tool for tool in self.tools if self.choice in (REQUIRED, tool.name)]
        if not wanted:
            raise BadInput(f"there is no tool {self.choice!r}", "Choose one of the tools.")
        return Constraint("tool_calls", forced_calls(self.dialect, wanted, term, several=self.several))


def speech(dialect: Dialect, options: Mapping[str, Any]) -> Speech:
    """What the options `tools`, `tool_choice` and `parallel_tool_calls` ask for. Raises BadInput.

    A choice is a word, a tool's name, or an object that names one as OpenAI has it.
    """
    choice: Any = options.get("tool_choice") or AUTO
    if isinstance(choice, Mapping):
        function: Any = choice.get("function", choice)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        choice = function.get("name") if isinstance(function, Mapping) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if not isinstance(choice, str):
        raise BadInput("the tool choice is none", "Give auto, none, required, or a tool's name.")
    given = tuple(options.get("tools") or ())
    if choice == NONE or not given:
        if choice not in (NONE, AUTO):
            raise BadInput("there are no tools to choose from", "Give some.")
        return Speech(dialect)
    tools = tuple(read_tools(given))
    if dialect.family is None:
        raise BadInput("this model's chat template knows no tools", "Leave them out.")
    return Speech(dialect, tools, given, choice, options.get("parallel_tool_calls") is not False)


def with_free_reasoning(held: Constraint, dialect: Dialect, rendered: str | None, term: Term) -> Constraint:
    """The same for what follows a model's reasoning, which is free. `rendered`: the prompt by the chat template."""
    if rendered is None:
        return held
    if dialect.is_harmony:
        return replace(held, before=_after_analysis(term, is_final=held.kind != "tool_calls"))
    end = rendered.rstrip()
    if dialect.thinks is None or end.endswith(dialect.thinks[1]):
        return held
    opening, closing = map(term, dialect.thinks)
    return after_reasoning(held, opening, closing, begun=end.endswith(dialect.thinks[0]))


def _after_analysis(term: Term, *, is_final: bool) -> str:
    channel, message, start = term(harmony.CHANNEL), term(harmony.MESSAGE), term(harmony.START)
    end = term(harmony.ENDS[0])
    final = f'{channel} "final" {message}' if is_final else ""
    before = f'before: ({channel} "analysis" {message} thought {start} "assistant")? {final}'
    return f"{before}\n{text_until(end, 'thought')}"
