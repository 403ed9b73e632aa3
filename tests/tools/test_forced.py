"""Answers by chance within a forced grammar are calls of the tools that there are, with arguments of their schemas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pocketmoe.errors import BadInput
from pocketmoe.grammar.constraint import Constraint
from pocketmoe.grammar.guide import Guides
from pocketmoe.tools.calls import Parsed, read_tools
from pocketmoe.tools.families import Dialect, dialect
from pocketmoe.tools.forced import Term, forced_calls
from pocketmoe.tools.speech import speech, with_free_reasoning
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
CONTENT = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 9}, "b": {"enum": [1, "<tool_call>", "[TOOL_CALLS]"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
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


def term_of(family: str, are_special: bool) -> Term:
    used, tokenizer, _ = made(family, are_special)

    def term(mark: str) -> str:
        return f"<[{tokenizer.token_to_id(mark)}]>" if are_special and mark in used.marks else json.dumps(mark)

    return term


def said(family: str, are_special: bool, seed: int, several: bool) -> str | None:
    used, tokenizer, guides = made(family, are_special)
    rules = forced_calls(used, TOOLS, term_of(family, are_special), several=several)
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


@ALL
@settings(max_examples=6, deadline=None)
@given(seed=SEEDS, are_special=st.booleans())
def test_held_content_or_calls_in_its_place(family: str, seed: int, are_special: bool) -> None:
    """With a schema for its content an answer is JSON of that schema, or calls: both may begin it, none follows the
    other, and a mark of calls within the JSON is text."""
    used, tokenizer, guides = made(family, are_special)
    term = term_of(family, are_special)
    spoken = speech(used, {"tools": GIVEN, "json_schema": CONTENT})
    held = spoken.held(Constraint("json_schema", json.dumps(CONTENT)), term)
    assert held
    rules = forced_calls(used, TOOLS, term)
    if used.is_harmony:  # without its reasoning, whose end is the end of texts by this tokenizer
        held = replace(with_free_reasoning(held, used, "", term), before="")
    both, calls = guides.guide(held), guides.guide(Constraint("grammar", rules))
    content = guides.guide(Constraint("json_schema", json.dumps(CONTENT)))
    first = calls.allowed | (content.allowed & (not used.is_harmony))
    assert not (first & ~both.allowed).any()
    beyond = [tokenizer.decode([token]) for token in np.flatnonzero(both.allowed & ~first).tolist()]
    assert all(text[:1].isspace() for text in beyond), "nothing more than a blank before JSON"
    tokens = walk(both, tokenizer, seed)
    assume(tokens is not None)
    text = tokenizer.decode(tokens or [], skip_special_tokens=False)
    found = spoken.parse(text)
    assert bool(found.calls) != bool(found.content), text
    if found.content:
        jsonschema.validate(json.loads(found.content), CONTENT)
    for call in found.calls:
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])


@ALL
def test_calls_within_held_content_are_text(family: str) -> None:
    """Whatever a family's calls look like, in a string of JSON that has to be content they are none."""
    text = next(text for seed in range(9) if (text := said(family, are_special=False, seed=seed, several=True)))
    inside = json.dumps({"a": text}, ensure_ascii=False)
    spoken = speech(dialect(TEMPLATES[family]), {"tools": GIVEN, "json_schema": CONTENT})
    if not spoken.dialect.is_harmony:  # whose channels are special tokens, which no string holds
        assert spoken.parse(inside) == Parsed(inside, "", ())
        parser = spoken.parser()
        assert Parsed.of([part for piece in inside for part in parser.push(piece)] + parser.finish()).content == inside


@ALL
def test_one_call_at_most_where_that_was_asked_for(family: str) -> None:
    """What the model goes on to call is dropped, however the answer is cut into pieces."""
    spoken = speech(dialect(TEMPLATES[family]), {"tools": GIVEN, "parallel_tool_calls": False})
    for text in filter(None, (said(family, False, seed, True) for seed in range(4))):
        first = dialect(TEMPLATES[family]).parse([text], TOOLS).calls[:1]
        for step in (1, 5, len(text)):
            parser = spoken.parser()
            parts = [part for at in range(0, len(text), step) for part in parser.push(text[at : at + step])]
            assert Parsed.of(parts + parser.finish()).calls == first


@pytest.mark.parametrize("name", ["none", "auto", "required", "now"])
def test_a_tool_may_be_called_as_a_choice_is(name: str) -> None:
    """An object that names it is never taken for the word."""
    tools = [{"type": "function", "function": {"name": each}} for each in (name, "other")]
    for choice in ({"type": "function", "function": {"name": name}}, {"name": name}):
        found = speech(dialect(TEMPLATES["hermes"]), {"tools": tools, "tool_choice": choice})
        assert (found.has_to_call, found.only) == (True, name)


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
