"""Answers as each family's template writes them come back as they were; what is no call is not lost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketmoe.chat_template.template import ChatTemplate
from pocketmoe.errors import BadInput
from pocketmoe.tools.calls import Parsed, Text, ToolCall, read_tools
from pocketmoe.tools.families import FAMILIES, THINK, Dialect, dialect
from pocketmoe.tools.messages import for_template
from tests.tools.templates import TEMPLATES, WITH_IDS, WITHOUT_CONTENT

PARAMETERS: dict[str, Any] = {
    "city": {"type": "string"},
    "days": {"type": "integer"},
    "exact": {"type": "boolean"},
    "places": {"type": "array", "items": {"type": "string"}},
    "more": {"type": "object"},
    "limit": {"type": ["number", "null"]},
}
GIVEN = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": PARAMETERS}}}
    for name in ("get_weather", "search")
]
TOOLS = read_tools(GIVEN)
ALL = pytest.mark.parametrize("family", TEMPLATES)
FEW = settings(max_examples=15, deadline=None)

words = st.text(st.sampled_from("abz éß日\"'\\{}[]:,.<>/|=\n0"), max_size=12)
lines = words.map(lambda text: text.strip())
plain = st.text(st.sampled_from("abc é.,"), min_size=1, max_size=20).map(str.strip).filter(bool)
arguments = st.fixed_dictionaries(
    {},
    optional={
        "city": lines,
        "days": st.integers(-99, 99),
        "exact": st.booleans(),
        "places": st.lists(words, max_size=3),
        "more": st.dictionaries(st.sampled_from(["a", "é b"]), st.integers() | words | st.none(), max_size=2),
        "limit": st.none() | st.integers(0, 5),
    },
)
calls = st.lists(st.tuples(st.sampled_from(["get_weather", "search"]), arguments), max_size=3)


@cache
def spoken(family: str) -> tuple[Dialect, ChatTemplate]:
    source = "{% set message = messages[-1] %}" + TEMPLATES[family]
    return dialect(source), ChatTemplate({"default": source}, {}, family)


def answered(template: ChatTemplate, used: Dialect, content: str, reasoning: str, made: Sequence[ToolCall]) -> str:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    if made:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in made
        ]
    return template.render(for_template([message], used), tools=GIVEN, add_generation_prompt=False)


def cut(text: str, places: Sequence[int]) -> list[str]:
    at = sorted({place % (len(text) + 1) for place in places})
    return [text[start:end] for start, end in zip([0, *at], [*at, len(text)], strict=True)]


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_a_family_is_told_by_its_template(family: str) -> None:
    """Each has a template here, and is what that template is taken for."""
    found = spoken(family)[0].family
    assert found is not None
    assert found.name == family


@ALL
@FEW
@given(content=plain | st.just(""), reasoning=plain | st.just(""), made=calls)
def test_what_a_template_writes_comes_back(family: str, content: str, reasoning: str, made: list[Any]) -> None:
    """Content, reasoning and calls, with arguments equal as JSON, and the same for every cut into pieces."""
    used, template = spoken(family)
    if family in WITHOUT_CONTENT and made:
        content = ""
    if not used.thinks and not used.is_harmony:
        reasoning = ""
    if not (content or made or reasoning):
        return
    given = [
        ToolCall.of(name, found, f"functions.{name}:{n}" if family == "kimi" else f"id{n}abcdef")
        for n, (name, found) in enumerate(made)
    ]
    text = answered(template, used, content, reasoning, given)
    found = used.parse([text], TOOLS)
    assert (found.content, found.reasoning) == (content, reasoning)
    assert [call.name for call in found.calls] == [call.name for call in given]
    assert [json.loads(call.arguments) for call in found.calls] == [json.loads(call.arguments) for call in given]
    assert [call.id for call in found.calls] == [call.id if family in WITH_IDS else None for call in given]
    assert used.parse(text, TOOLS) == found


@cache
def noise(family: str) -> st.SearchStrategy[str]:
    """Texts made of the family's marks, parts of calls, and other things."""
    used, template = spoken(family)
    call = answered(template, used, "", "", [ToolCall.of("search", {"city": "Ulm", "days": 3}, "id")])
    marks = [
        *used.marks,
        "<think>",
        "</think>",
        "to=functions.search",
        "analysis",
        "final",
        "search",
        '{"name": "search"}',
    ]
    pieces = st.sampled_from([*marks, call, call[: len(call) // 2], call[len(call) // 2 :], call[:-1]])
    return st.lists(pieces | st.text(st.sampled_from('a{}[]"<|> \n'), max_size=4), max_size=8).map("".join)


@ALL
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_text_cut_anywhere_parses_like_the_whole(family: str, data: st.DataObject) -> None:
    """Never an error; the same parts; what is said and what is called is the model's own."""
    used = spoken(family)[0]
    text = data.draw(noise(family))
    begun = data.draw(st.booleans())
    whole = used.parse([text], TOOLS, begun=begun)
    pieces = cut(text, data.draw(st.lists(st.integers(0, 200), max_size=6)))
    assert used.parse(pieces, TOOLS, begun=begun) == whole
    assert used.parse(text, TOOLS, begun=begun) == whole
    for call in whole.calls:
        assert isinstance(json.loads(call.arguments), dict)
    said = whole.reasoning + whole.content
    if not whole.calls and not used.is_harmony:
        left = text
        for mark in used.thinks or THINK:
            left, said = left.replace(mark, ""), said.replace(mark, "")
        assert "".join(said.split()) == "".join(left.split())


@ALL
def test_without_tools_nothing_is_a_call(family: str) -> None:
    """A model that was given no tools may write whatever looks like a call."""
    used, template = spoken(family)
    text = answered(template, used, "", "", [ToolCall.of("search", {"city": "Ulm"}, "id")])
    if not used.is_harmony:
        assert used.parse([text]) == Parsed(text.strip() if used.thinks else text, "", ())


@pytest.mark.parametrize(
    ("family", "text", "content", "called"),
    [
        (
            "hermes",
            '<tool_call>\n{"name": "f", "arguments": {"a": "</tool_call>"}}\n</tool_call>',
            "",
            [("f", {"a": "</tool_call>"})],
        ),
        ("hermes", '<tool_call>\n{"name": "f", "arguments": "{\\"a\\": 1}"}\n</tool_call>', "", [("f", {"a": 1})]),
        ("hermes", '<tool_call>{"name": "f"}', "", [("f", {})]),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
            '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
            [],
        ),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', []),
        (
            "hermes",
            'Hm.<tool_call>{"x</tool_call>\n<tool_call>{"name": "f"}</tool_call>',
            'Hm.<tool_call>{"x</tool_call>',
            [("f", {})],
        ),
        ("hermes", "a <tool_ca", "a <tool_ca", []),
        ("hermes", "<tool_call>" + "[" * 5000 + "</tool_call>", "<tool_call>" + "[" * 5000 + "</tool_call>", []),
        (
            "qwen-coder",
            "<function=search>\n<parameter=city>\na\nb\n</parameter>\n</function>",
            "",
            [("search", {"city": "a\nb"})],
        ),
        (
            "qwen-coder",
            "<tool_call>\n<function=search>\n<parameter=days>\nsome\n</parameter>\n</function>\n</tool_call>",
            "",
            [("search", {"days": "some"})],
        ),
        (
            "qwen-coder",
            "<tool_call>\n<function=search>\n<parameter=exact>\nTrue\n</parameter>\n</function>\n</tool_call>",
            "",
            [("search", {"exact": True})],
        ),
        (
            "qwen-coder",
            "<tool_call>\n<function=g>\n<parameter=n>\n12\n</parameter>\n</function>\n</tool_call>",
            "",
            [("g", {"n": 12})],
        ),
        ("llama3", '{"name": "search", "parameters": {"days": 1}}', "", [("search", {"days": 1})]),
        ("llama3", '{"name": "nobody", "parameters": {}}', '{"name": "nobody", "parameters": {}}', []),
        ("llama3", '{"answer": 42}', '{"answer": 42}', []),
        ("llama3", '<|python_tag|>{"name": "search", "parameters": {}}', "", [("search", {})]),
        (
            "llama4",
            "[search(days=-1, exact=True, more={'a': None})]",
            "",
            [("search", {"days": -1, "exact": True, "more": {"a": None}})],
        ),
        ("llama4", "[search(days=__import__('os'))]", "[search(days=__import__('os'))]", []),
        ("llama4", "[1, 2]", "[1, 2]", []),
        ("llama4", "[search(1)]", "[search(1)]", []),
        (
            "mistral",
            'Yes.[TOOL_CALLS]search[ARGS]{"days": 1}[TOOL_CALLS]search[ARGS]{}',
            "Yes.",
            [("search", {"days": 1}), ("search", {})],
        ),
        ("mistral", "[TOOL_CALLS] nothing", "[TOOL_CALLS] nothing", []),
        ("harmony", " to=functions.search<|channel|>commentary json<|message|>{}<|call|>", "", [("search", {})]),
        (
            "harmony",
            "<|channel|>commentary to=functions.search<|message|>{oops<|call|>",
            "<|channel|>commentary to=functions.search<|message|>{oops",
            [],
        ),
        ("harmony", "Just text.", "Just text.", []),
        ("harmony", "<|channel|>final<|message|>Hi", "Hi", []),
        ("harmony", "<|channel|>final", "<|channel|>final", []),
        (
            "glm",
            "<tool_call>search<arg_key>city</arg_key><arg_value>3</arg_value></tool_call>",
            "",
            [("search", {"city": "3"})],
        ),
    ],
)
def test_what_models_write_beside_the_form(family: str, text: str, content: str, called: list[Any]) -> None:
    """Marks inside arguments, arguments as text, nothing closed, nothing valid: read, or left as it is."""
    used = spoken(family)[0]
    for pieces in ([text], text):
        found = used.parse(pieces, TOOLS)
        assert found.content == content
        assert [(call.name, json.loads(call.arguments)) for call in found.calls] == called


def test_reasoning_arrives_as_it_comes_and_calls_when_they_are_whole() -> None:
    """Pieces are given as soon as they are certain."""
    parser = spoken("hermes")[0].parser(TOOLS)
    assert parser.push("<think>\nLet me") == [Text("reasoning", "Let me")]
    assert parser.push(" see.</thi") == [Text("reasoning", " see.")]
    assert parser.push("nk>\n\nHello") == [Text("content", "Hello")]
    assert parser.push(" there\n<tool_call>") == [Text("content", " there")]
    assert parser.push('{"name": "f", "arguments": {}}</tool_call') == []
    assert parser.push(">") == [ToolCall("f", "{}")]
    assert parser.finish() == []


@pytest.mark.parametrize(
    "wrong", [[1], [{}], [{"function": {"name": ""}}], [{"function": {"name": "a", "parameters": 3}}], GIVEN + GIVEN]
)
def test_tools_are_checked(wrong: list[Any]) -> None:
    """What is no function with a name and a schema is refused."""
    with pytest.raises(BadInput):
        read_tools(wrong)
    for calls in (3, [1], [{}], [{"function": {"arguments": "{}"}}]):
        with pytest.raises(BadInput):
            for_template([{"role": "assistant", "tool_calls": calls}], Dialect())
