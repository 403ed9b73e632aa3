"""What each family of models writes, told by its chat template: where calls stand, how they look, what opens reasoning.

A template shows past calls to the model in the form in which it is to write new ones, so its source has the marks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pocketmoe.tools import harmony
from pocketmoe.tools.calls import Parsed, Part, Tool
from pocketmoe.tools.harmony import Harmony
from pocketmoe.tools.json_bodies import deepseek, kimi, llama, mistral, one_or_more, pythonic
from pocketmoe.tools.sections import Section, Sections
from pocketmoe.tools.tagged_bodies import glm, invoked, qwen

THINK = ("<think>", "</think>")  # of DeepSeek-R1, Qwen3, GLM and those that came after them


class Parser(Protocol):
    """Takes an answer's text in pieces and gives its parts."""

    def push(self, piece: str) -> list[Part]: ...

    def finish(self) -> list[Part]: ...


@dataclass(frozen=True)
class Family:
    """A way to write calls. `told_by`: what a template has of it, each of these."""

    name: str
    told_by: tuple[str, ...]
    sections: tuple[Section, ...] = ()
    marks: tuple[str, ...] = ()  # inside sections, beside those at their ends
    arguments_as_text: bool = False  # its template joins past calls' arguments to other text


@dataclass(frozen=True)
class Dialect:
    """What one model writes: its family's calls, where its template knows tools, and reasoning in its marks."""

    family: Family | None = None
    thinks: tuple[str, str] | None = None

    @property
    def marks(self) -> frozenset[str]:
        """What has to be seen in an answer's text, even where it is a special token."""
        family = self.family
        if family is None:
            return frozenset(self.thinks or ())
        sections = [section for section in family.sections if not section.keeps]
        ends = [mark for section in sections for mark in (section.opening, section.closing)]
        return frozenset(mark for mark in (*ends, *family.marks, *(self.thinks or ())) if mark)

    @property
    def is_harmony(self) -> bool:
        return self.family is HARMONY

    def opens_reasoning(self, prompt: str) -> bool:
        """Whether a prompt, as the template has rendered it, ends with the mark that begins the model's reasoning."""
        return prompt.rstrip().endswith((self.thinks or THINK)[0])

    def parser(self, tools: Sequence[Tool] = (), *, begun: bool = False, calls_first: bool = False) -> Parser:
        """For one answer. `tools`: those that the model was given; without any, calls are content.

        `begun`: the prompt has opened the reasoning. `calls_first`: what comes after content is content.
        """
        if self.is_harmony:
            return Harmony()
        sections = self.family.sections if self.family and tools else ()
        return Sections(
            sections, self.thinks or THINK, tools, begun, calls_first
        )  # some think though no template says so

    def parse(self, pieces: Iterable[str], tools: Sequence[Tool] = (), *, begun: bool = False) -> Parsed:
        """A whole answer."""
        parser = self.parser(tools, begun=begun)
        parts = [part for piece in pieces for part in parser.push(piece)]
        return Parsed.of([*parts, *parser.finish()])


HARMONY = Family("harmony", (harmony.CHANNEL, harmony.MESSAGE), marks=harmony.MARKS)
_DEEPSEEK_MARKS = ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>")
_KIMI_MARKS = ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")

FAMILIES: tuple[Family, ...] = (  # the first whose marks a template has
    HARMONY,
    Family(
        "deepseek",  # V3 and R1
        ("<｜tool▁calls▁begin｜>", "```json"),
        (Section("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", deepseek),),
        _DEEPSEEK_MARKS,
        arguments_as_text=True,
    ),
    Family(
        "deepseek-v31",
        ("<｜tool▁calls▁begin｜>",),
        (Section("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", deepseek),),
        _DEEPSEEK_MARKS,
        arguments_as_text=True,
    ),
    Family(
        "kimi",
        ("<|tool_calls_section_begin|>",),
        (Section("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", kimi),),
        _KIMI_MARKS,
    ),
    Family("minimax", ("<minimax:tool_call>",), (Section("<minimax:tool_call>", "</minimax:tool_call>", invoked),)),
    Family("glm", ("<arg_key>",), (Section("<tool_call>", "</tool_call>", glm),)),
    Family(
        "qwen-coder",
        ("<function=",),
        (
            Section("<tool_call>", "</tool_call>", qwen),
            Section("<function=", "</function>", lambda b, t: qwen(f"{b}</function>", t), keeps=True),
        ),
    ),
    Family(
        "mistral-names",  # since 2025
        ("[TOOL_CALLS]", "[ARGS]"),
        (Section("[TOOL_CALLS]", "", mistral),),
        ("[CALL_ID]", "[ARGS]"),
    ),
    Family("mistral", ("[TOOL_CALLS]",), (Section("[TOOL_CALLS]", "", mistral),)),
    Family("lfm", ("<|tool_call_start|>",), (Section("<|tool_call_start|>", "<|tool_call_end|>", pythonic),)),
    Family("nemotron", ("<TOOLCALL>",), (Section("<TOOLCALL>", "</TOOLCALL>", one_or_more),)),
    Family("json-lines", ("<tool_calls>",), (Section("<tool_calls>", "</tool_calls>", one_or_more),)),
    Family("granite", ("<|tool_call|>",), (Section("<|tool_call|>", "", one_or_more),)),
    Family("hermes", ("<tool_call>",), (Section("<tool_call>", "</tool_call>", one_or_more),)),
    Family(
        "llama4",
        ("<|python_start|>", "tools"),
        (
            Section("<|python_start|>", "<|python_end|>", pythonic, at_start=True),
            Section("[", "", pythonic, at_start=True, keeps=True),
            Section("{", "", llama, at_start=True, keeps=True),
        ),
    ),
    Family(
        "llama3",
        ('"parameters":', "tools"),
        (
            Section("<|python_tag|>", "", llama, at_start=True),
            Section("{", "", llama, at_start=True, keeps=True),
        ),
        ("<|eom_id|>",),
    ),
)


def dialect(template: str | None) -> Dialect:
    """What a model with that chat template writes."""
    if not template:
        return Dialect()
    family = next((family for family in FAMILIES if all(mark in template for mark in family.told_by)), None)
    if family is HARMONY:
        return Dialect(family)
    reasoning = [marks for marks in (THINK, ("[THINK]", "[/THINK]")) if marks[0] in template or marks[1] in template]
    return Dialect(family, reasoning[0] if reasoning else None)
