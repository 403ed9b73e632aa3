"""Answers by chance, held to a constraint: whatever is chosen of what is allowed, the text keeps to it."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from pocketmoe.errors import BadInput
from pocketmoe.grammar.constraint import Constraint, after_reasoning, constraint
from pocketmoe.grammar.guide import Guide, Guides, guide_bytes
from pocketmoe.isolated import isolated
from pocketmoe.runtime.memory.budget import trim
from pocketmoe.system.memory import process_bytes
from tests.grammar.kinds import END, KINDS

MOST = 300  # tokens
FEW = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
ALL_KINDS = pytest.mark.parametrize("kind", KINDS)
CLOSING = {'"', "}", "]", '"}'}
SEEDS = st.integers(0, 2**32 - 1)


def end_of(tokenizer: tokenizers.Tokenizer) -> int:
    end = tokenizer.token_to_id(END)
    assert end is not None
    return end


@cache
def made(kind: str) -> tuple[tokenizers.Tokenizer, Guides]:
    tokenizer = KINDS[kind]()
    return tokenizer, Guides(tokenizer, tokenizer.get_vocab_size() + 3, [end_of(tokenizer)])


@pytest.fixture(autouse=True, scope="module")
def _compiled_here() -> Iterator[None]:
    """Without a child for each of hundreds of grammars; the child is tried in test_api."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pocketmoe.grammar.guide.isolated", lambda work, _: work())
        yield


def held(**asked: Any) -> Constraint:
    found = constraint(**asked)
    assert found is not None
    return found


def guide_or_none(kind: str, asked: Constraint) -> Guide | None:
    try:
        return made(kind)[1].guide(asked)
    except BadInput:
        return None


def walk(guide: Guide, tokenizer: tokenizers.Tokenizer, seed: int) -> list[int] | None:
    """An answer by chance, rather short; None where it has not ended after MOST tokens, or cannot be spelled."""
    rng, end = np.random.default_rng(seed), end_of(tokenizer)
    names = [(tokenizer.id_to_token(token) or "").strip("#▁") for token in range(len(guide.allowed))]
    tokens: list[int] = []
    try:
        tokens += guide.forced(MOST)
        while len(tokens) < MOST and not guide.complete:
            ids = np.flatnonzero(guide.allowed).tolist()
            assert ids, "a guide that is not complete allows something"
            closing = [token for token in ids if names[token] in CLOSING]
            token = int(rng.choice(closing if closing and rng.random() < 0.5 else ids))
            if token == end or (guide.allowed[end] and rng.random() < 0.3):
                return tokens
            guide.accept(token)
            tokens += [token, *guide.forced(MOST)]
    except BadInput as error:
        if "tokens can spell" in str(error):
            return None
        raise
    return tokens if guide.complete else None


def _pieces() -> SearchStrategy[str]:
    literal = st.sampled_from(["a", "b", "ab", "0", "/", "é", " ", ",", "\\.", '"', "the", "日"])
    classes = st.sampled_from(["[a-f]", "[^a]", "[0-9]", ".", "[ab/]", r"[\]x]", "[A-Za-z ]"])
    return literal | classes


def regexes() -> SearchStrategy[str]:
    """Expressions that mean the same to Python and to Rust."""

    def larger(inner: SearchStrategy[str]) -> SearchStrategy[str]:
        repeated = st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{0,2}"]))
        return (
            st.lists(inner, min_size=1, max_size=4).map("".join)
            | st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})")
            | repeated.map(lambda pair: f"(?:{pair[0]}){pair[1]}")
        )

    return st.recursive(_pieces(), larger, max_leaves=8)


@st.composite
def scalars(draw: DrawFn) -> dict[str, Any]:
    low, high = sorted(draw(st.tuples(st.integers(-50, 50), st.integers(-50, 50))))
    return draw(
        st.sampled_from(
            [
                {"type": "string"},
                {"type": "string", "minLength": abs(low) % 4, "maxLength": 4 + abs(high) % 8},
                {"type": "string", "pattern": "^[a-c]{1,5}$"},
                {"type": "string", "format": "date"},
                {"type": "integer", "minimum": low, "maximum": high},
                {"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": high + 1},
                {"type": "integer", "multipleOf": 3},
                {"type": ["boolean", "null"]},
                {"enum": ["the", 12, None, {"a": [1]}]},
                {"const": 'é"'},
            ]
        )
    )


def schemas() -> SearchStrategy[dict[str, Any]]:
    """Schemas of what is held, nested."""

    def larger(inner: SearchStrategy[dict[str, Any]]) -> SearchStrategy[dict[str, Any]]:
        names = st.sampled_from(["name", "age", "é", "a/b", "x y"])
        objects = st.tuples(st.dictionaries(names, inner, max_size=3), st.booleans(), st.sets(names, max_size=2))
        return (
            objects.map(
                lambda found: {
                    "type": "object",
                    "properties": found[0],
                    "required": sorted(found[2] & found[0].keys()),
                    "additionalProperties": False if found[1] else {"type": "integer"},
                }
            )
            | st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
                lambda found: {"type": "array", "items": found[0], "minItems": found[1], "maxItems": sum(found[1:])}
            )
            | st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts})
            | st.lists(inner, min_size=1, max_size=2).map(
                lambda parts: {"type": "array", "prefixItems": parts, "items": {"type": "null"}, "maxItems": 3}
            )
            | inner.map(lambda part: {"$defs": {"a": part}, "type": "array", "items": {"$ref": "#/$defs/a"}})
        )

    return st.recursive(scalars(), larger, max_leaves=5).filter(
        lambda schema: "$ref" not in str(schema) or "$defs" in schema
    )


@ALL_KINDS
@FEW
@given(pattern=regexes(), seed=SEEDS)
def test_a_regular_expression_matches_the_whole_text(kind: str, pattern: str, seed: int) -> None:
    """By Python's own `re`; for every kind of tokenizer."""
    guide = guide_or_none(kind, held(regex=pattern))
    assume(guide is not None)
    assert guide is not None
    tokenizer = made(kind)[0]
    tokens = walk(guide, tokenizer, seed)
    assume(tokens is not None)
    assert tokens is not None
    assert re.fullmatch(pattern, tokenizer.decode(tokens))


@ALL_KINDS
@FEW
@given(schema=schemas(), seed=SEEDS)
def test_a_json_schema_validates_the_text(kind: str, schema: dict[str, Any], seed: int) -> None:
    """By jsonschema; what cannot be held was refused before."""
    guide = guide_or_none(kind, held(json_schema=schema))
    assume(guide is not None)
    assert guide is not None
    tokenizer = made(kind)[0]
    tokens = walk(guide, tokenizer, seed)
    assume(tokens is not None)
    assert tokens is not None
    found = json.loads(tokenizer.decode(tokens))
    jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(found)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "string"}, '"日本 \\n \\u0000 \\" é"'),
        ({"type": "object"}, '{"a": {"b": [1, -2.5e3, null]}, "": true}'),
        ({"type": "array", "items": {"type": "integer"}}, "[\n    1,\n    2\n]"),
        ({"type": "number", "minimum": 0, "maximum": 1}, "0.25"),
        ({"type": "string", "format": "date-time"}, '"2026-11-30T12:00:00Z"'),
        ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}}, "[[], [[]]]"),
        ({"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}, '{"a":null,"b":1}'),
        ({"allOf": [{"minLength": 2}, {"type": "string", "maxLength": 3}]}, '"abc"'),
        ({"title": "T", "description": "d", "default": 1, "x-other": 1, "enum": [1, "1"]}, '"1"'),
        (True, "[]"),
    ],
)
def test_what_a_schema_allows_can_be_said(kind: str, schema: Any, text: str) -> None:
    """Valid texts as people and models write them are allowed token by token, and may end there."""
    tokenizer, guides = made(kind)
    guide = guides.guide(held(json_schema=json.dumps(schema)))
    tokens = tokenizer.encode(text).ids
    for token in tokens[tokenizer.id_to_token(tokens[0]) == "▁" :]:
        assert guide.allowed[token], tokenizer.id_to_token(token)
        guide.accept(token)
    assert guide.complete or guide.allowed[end_of(tokenizer)]


@FEW
@given(schema=schemas(), seed=SEEDS)
def test_what_is_forced_is_what_was_left(schema: dict[str, Any], seed: int) -> None:
    """Tokens that are forced together are those that step by step would each have been the only one allowed."""
    together, one_by_one = (guide_or_none("byte_level", held(json_schema=schema)) for _ in range(2))
    assume(together is not None and one_by_one is not None)
    assert together is not None
    assert one_by_one is not None
    tokenizer, rng = made("byte_level")[0], np.random.default_rng(seed)
    for _ in range(30):
        for token in together.forced(MOST):
            assert np.flatnonzero(one_by_one.allowed).tolist() == [token]
            one_by_one.accept(token)
        assert (together.allowed == one_by_one.allowed).all()
        assert together.complete == one_by_one.complete
        choice = [token for token in np.flatnonzero(together.allowed).tolist() if token != end_of(tokenizer)]
        if together.complete or not choice:
            return
        token = int(rng.choice(choice))
        together.accept(token)
        one_by_one.accept(token)


def test_reasoning_is_free_and_what_follows_it_is_not() -> None:
    """Begun by the prompt, or opened by the model itself; with marks that are text, and with special tokens."""
    tokenizer = KINDS["byte_level"]()
    tokenizer.add_special_tokens(["[THINK]", "[/THINK]"])
    guides = Guides(tokenizer, tokenizer.get_vocab_size(), [end_of(tokenizer)])
    number = held(regex="[0-9]{2}")

    def allows(asked: Constraint, text: str) -> bool:
        guide = guides.guide(asked)
        for token in tokenizer.encode(text).ids:
            if not guide.allowed[token]:
                return False
            guide.accept(token)
        return guide.complete

    begun = after_reasoning(number, '"<think>"', '"</think>"', begun=True)
    assert allows(begun, 'any "thing"\n</think>42')
    assert not allows(begun, "42")
    assert not allows(begun, "a</think>x")
    maybe = after_reasoning(number, '"<think>"', '"</think>"', begun=False)
    assert allows(maybe, "<think>any</think>42")
    assert allows(maybe, "42")
    assert not allows(maybe, "any</think>42")
    special = after_reasoning(
        number, *(f"<[{tokenizer.token_to_id(mark)}]>" for mark in ("[THINK]", "[/THINK]")), begun=False
    )
    assert allows(special, "[THINK]any </think>[/THINK]42")
    assert allows(special, "42")


def test_an_end_in_the_grammar_is_allowed_and_ends_elsewhere_only_where_the_text_may() -> None:
    """A special token that ends texts is part of no text, but a grammar may ask for it."""
    tokenizer, guides = made("byte_level")
    guide = guides.guide(held(grammar=f'start: "a" {END}'))
    guide.accept(tokenizer.encode("a").ids[0])
    assert np.flatnonzero(guide.allowed).tolist() == [end_of(tokenizer)]
    guide = guides.guide(held(regex="a+"))
    assert not guide.allowed[end_of(tokenizer)]
    guide.accept(tokenizer.encode("a").ids[0])
    assert guide.allowed[end_of(tokenizer)]
    assert not guide.complete
    guide.accept(end_of(tokenizer))
    assert guide.complete
    assert guide.forced(9) == []


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "'uniqueItems'"),
        ({"json_schema": {"properties": {"a": {"not": {}}}}}, "'not'"),
        ({"json_schema": {"type": "string", "minLenght": 1}}, "'minLenght'"),
        ({"json_schema": {"items": [{}]}}, "prefixItems"),
        ({"json_schema": {"exclusiveMinimum": True}}, "exclusiveMinimum"),
        ({"json_schema": "[1]"}, "no object"),
        ({"json_schema": "false"}, "allows nothing"),
        ({"json_schema": "{"}, "cannot be read"),
        ({"json_schema": "[" * 100_000}, "cannot be read"),
        ({"json_schema": {"a": object()}}, "cannot be read"),
        ({"json_schema": {"type": "integer", "minimum": 2, "maximum": 1}}, "minimum"),
        ({"json_schema": {"type": "string", "format": "regex"}}, "Unknown format"),
        ({"json_schema": {"$ref": "https://example.org/x"}}, "example.org"),
        ({"json_schema": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "oneOf"),
        ({"regex": ""}, "empty"),
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": "(?=a)a"}, "look-around"),
        ({"regex": "[^\\s\\S]"}, "no text"),
        ({"regex": "a{0}"}, "empty answer"),
        ({"regex": "a" * (1 << 21)}, "MiB"),
        ({"grammar": "nonsense"}, "Expected token"),
        ({"grammar": 'start: a\na: a "x"'}, "no text"),
        ({"grammar": 'start: "a" <|nobody|>'}, "unknown special token"),
        ({"regex": "a", "grammar": 'start: "a"'}, "regex and grammar at once"),
    ],
)
def test_what_cannot_be_held_is_refused_at_once_by_name(asked: dict[str, Any], named: str) -> None:
    """One line that says what; nothing is generated first."""
    with pytest.raises(BadInput) as refused:
        made("byte_level")[1].guide(held(**asked))
    assert named in refused.value.one_line()
    assert "\n" not in refused.value.one_line()
    assert len(refused.value.one_line()) < 500


@pytest.mark.parametrize(
    "asked",
    [
        {"json_schema": {"enum": [f"v{number * 7919}" for number in range(60_000)]}},
        {"json_schema": {"properties": {f"p{number}": {"type": "string"} for number in range(20_000)}}},
        {"regex": "(.*a.{1,2000}){1,50}"},
        {"grammar": "start: a\na: " + " | ".join(f'"{number}" a a' for number in range(5000)) + ' | "x"'},
        {"json_schema": {"type": "string", "pattern": "(a|b|ab){1,5000}(c.{500}){300}"}},
    ],
    ids=["enum", "properties", "regex", "grammar", "pattern"],
)
def test_what_is_too_much_ends_alone(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A hostile grammar is refused, or followed, within limits of memory: in the child, and step by step."""
    monkeypatch.setattr("pocketmoe.grammar.guide.isolated", isolated)
    tokenizer = made("byte_level")[0]
    trim()
    before = process_bytes()
    with contextlib.suppress(BadInput):
        walk(Guides(tokenizer, tokenizer.get_vocab_size(), []).guide(held(**asked)), tokenizer, seed=1)
    trim()
    assert process_bytes() - before < guide_bytes(tokenizer.get_vocab_size())


class Answer:
    """A class that says its own schema, as pydantic's do."""

    @staticmethod
    def model_json_schema() -> dict[str, Any]:
        return {"type": "null"}


def test_a_class_may_give_its_schema() -> None:
    assert held(json_schema=Answer).source == '{"type": "null"}'
    assert constraint() is None
