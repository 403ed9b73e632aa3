"""What an answer is held to: a JSON schema, a regular expression, or a grammar; checked before anything is computed."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, Literal

from pocketmoe.errors import BadInput
from pocketmoe.grammar.json_schema import MOST_BYTES, read_schema

Kind = Literal["json_schema", "regex", "grammar", "tool_calls"]

# Where a schema leaves it open: nothing, a space, or a new line and its indentation. Without an end a model may go on
# with white space for ever.
WHITESPACE = r" |\n {0,40}"
_BODY, _CALLS = "body", "calls"


@dataclass(frozen=True)
class Constraint:
    """`source`: the schema as JSON text, the expression, or the grammar in llguidance's form of Lark.

    `before`: what may come before it, as rules in that form of which `before` is the first: a model's reasoning.
    `opening`: what opens it after that, as terms of such a rule. `calls`: what may come in its place, as rules of which
    `start` is the first: calls of tools.
    """

    kind: Kind
    source: str
    before: str = ""
    opening: str = ""
    calls: str = ""

    def grammar(self) -> str:
        """As llguidance takes it. Raises BadInput."""
        if self.kind == "json_schema":
            schema = json.loads(self.source)
            schema.setdefault("x-guidance", {"whitespace_pattern": WHITESPACE})
            body: dict[str, Any] = {"json_schema": schema}
        elif self.kind == "regex":
            body = {"lark_grammar": f"start: /{_escaped(self.source)}/"}
        else:
            body = {"lark_grammar": self.source}
        grammars = [{"name": _BODY, **body}]
        held = f"{self.opening} @{_BODY}".lstrip()
        if self.calls:
            grammars.append({"name": _CALLS, "lark_grammar": self.calls})
            held = f"({held} | @{_CALLS})"
        if self.before:
            held = f"before {held}"
        if len(held) > len(f"@{_BODY}"):
            grammars.insert(0, {"lark_grammar": f"start: {held}\n{self.before}"})
        return json.dumps({"grammars": grammars})


def constraint(json_schema: object = None, regex: str | None = None, grammar: str | None = None) -> Constraint | None:
    """What was asked for, at most one of the three; None where nothing was. Raises BadInput.

    `json_schema`: a mapping, JSON text, or a class with `model_json_schema`.
    """
    given = [
        kind
        for kind, value in (("json_schema", json_schema), ("regex", regex), ("grammar", grammar))
        if value is not None
    ]
    if len(given) > 1:
        raise BadInput(f"an answer cannot be held to {' and '.join(given)} at once", "Choose one.")
    if json_schema is not None:
        return Constraint("json_schema", json.dumps(read_schema(json_schema)))
    for kind, text in (("regex", regex), ("grammar", grammar)):
        if text is not None:
            return _of_text(kind, text)  # type: ignore[arg-type]
    return None


def after_reasoning(held: Constraint, opening: str, closing: str, *, begun: bool) -> Constraint:
    """The same for what follows a model's reasoning, which is free, and ends with `closing`.

    The marks are terms of a grammar: a string in quotes, or a special token as <[ID]>. `begun`: the prompt has opened
    the reasoning; else the model may, with `opening`.
    """
    before = "before: thought" if begun else f"before: ({opening} thought)?"
    return replace(held, before=f"{before}\n{text_until(closing, 'thought')}")


def text_until(mark: str, rule: str) -> str:
    """A rule for any text, and then the mark: a string in quotes, or a special token as <[ID]>."""
    return f"{rule}: /(?s:.*)/ {mark}" if mark.startswith("<[") else f"{rule}[suffix={mark}]: /(?s:.*)/"


def _of_text(kind: Kind, text: str) -> Constraint:
    if not text:
        raise BadInput(f"the {kind} is empty", "Give one, or leave it out.")
    if len(text) > MOST_BYTES:
        raise BadInput(f"the {kind} has more than {MOST_BYTES >> 20} MiB", "Give a smaller one.")
    return Constraint(kind, text)


def _escaped(regex: str) -> str:
    """An expression between slashes: slashes and line ends in it escaped, unless they are already."""
    pieces: list[str] = []
    escaped = False
    for character in regex:
        if character == "/" and not escaped:
            pieces.append("\\/")
        elif character == "\n":
            pieces.append("n" if escaped else "\\n")
        else:
            pieces.append(character)
        escaped = character == "\\" and not escaped
    return "".join(pieces)
