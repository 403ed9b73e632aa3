"""Answers by chance within a forced grammar are calls of the tools that there are, with arguments of their schemas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import jsonschema
import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pocketmoe.errors import BadInput
from pocketmoe.grammar.constraint import Constraint
from pocketmoe.grammar.guide import Guides
from pocketmoe.tools.calls import read_tools
from pocketmoe.tools.families import Dialect, dialect
from pocketmoe.tools.forced import forced_calls
from tests.grammar.kinds import KINDS
from tests.grammar.test_guide import SEEDS, end_of, walk
from tests.tools.templates import TEMPLATES

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 9},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "places": {"type": "array", "items": {"$ref": "#/$defs/place"}, "maxItems": 2},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"place": {"enum": ["here", "there"]}},
}
GIVEN: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
    {
        "type": "function",
        "function": {
            "name": "set",
            "parameters": {
                "type": "object",
                "properties": {"on": {"type": "boolean"}, "level": {"type": ["integer", "null"]}},
                "additionalProperties": False,
            },
        },
    },
]
TOOLS = read_tools(GIVEN)
SCHEMAS: dict[str, Any] = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in GIVEN}
ALL = pytest.mark.parametrize("family", TEMPLATES)


@pytest.fixture(autouse=True, scope="module")
def _compiled_here() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pocketmoe.grammar.guide.isolated", lambda work, _: work())
        yield


@cache
def made(family: str, are_special: bool) -> tuple[Dialect, tokenizers.Tokenizer, Guides]:
    """A model's words, with the family's marks as special tokens or as none; `<|call|>` ends a text."""
    used, tokenizer = dialect(TEMPLATES[family]), KINDS["byte_level"]()
    marks = sorted(used.marks)
    if are_special:
        tokenizer.add_special_tokens(marks)
    ends = [end_of(tokenizer), *([tokenizer.token_to_id("<|call|>")] if are_special and used.is_harmony else [])]
    return used, tokenizer, Guides(tokenizer, tokenizer.get_vocab_size(), [end for end in ends if end is not None])


def said(family: str, are_special: bool, seed: int, several: bool) -> str | None:
    used, tokenizer, guides = made(family, are_special)

    def term(mark: str) -> str:
        return f"<[{tokenizer.token_to_id(mark)}]>" if are_special and mark in used.marks else json.dumps(mark)

    rules = forced_calls(used, TOOLS, term, several=several)
    tokens = walk(guides.guide(Constraint("grammar", rules)), tokenizer, seed)
    return None if tokens is None else tokenizer.decode(tokens, skip_special_tokens=False)


@ALL
@settings(max_examples=8, deadline=None)
@given(seed=SEEDS, several=st.booleans(), are_special=st.booleans())
def test_what_is_forced_is_read_as_calls(family: str, seed: int, several: bool, are_special: bool) -> None:
    """By the same family's parser; names are the tools', arguments valid by jsonschema, nothing else is said."""
    text = said(family, are_special, seed, several)
    assume(text is not None)
    assert text is not None
    found = dialect(TEMPLATES[family]).parse([text], TOOLS)
    assert found.content == ""
    assert found.calls, text
    assert several or len(found.calls) == 1
    for call in found.calls:
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])


def test_what_cannot_be_forced_is_refused() -> None:
    """A model without a form for calls, no tools, and a strict schema that cannot be held."""
    with pytest.raises(BadInput, match="knows no tools"):
        forced_calls(Dialect(), TOOLS, json.dumps)
    with pytest.raises(BadInput, match="no tools to be called"):
        forced_calls(dialect(TEMPLATES["hermes"]), [], json.dumps)
    unheld = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    function = {"name": "f", "parameters": unheld}
    assert read_tools([{"function": function}])[0].held == {"type": "object"}
    with pytest.raises(BadInput, match="uniqueItems"):
        read_tools([{"function": {**function, "strict": True}}])
