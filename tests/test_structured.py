"""Answers of the tiny bundle that are held to a schema, an expression or a grammar."""

# pyright: reportArgumentType=false

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, assume, given, settings

import pocketmoe
from pocketmoe.bundle.reader import Bundle
from pocketmoe.cli import main
from pocketmoe.errors import BadInput
from pocketmoe.tools.calls import ToolCall
from tests.grammar.test_guide import SEEDS, regexes, schemas
from tests.runnable import put

PAGE = Path(__file__).parents[1] / "docs" / "STRUCTURED.md"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FEW = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


@pytest.fixture(scope="module")
def root(tiny_bundle: Callable[[str], Bundle], tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("structured") / "TINY"
    shutil.copytree(tiny_bundle("olmoe").root, copy, ignore=shutil.ignore_patterns("packed"))
    return copy


@pytest.fixture(scope="module")
def model(root: Path) -> Iterator[pocketmoe.Model]:
    with pocketmoe.load(root, memory="50%") as model:
        yield model


@FEW
@given(schema=schemas(), seed=SEEDS)
def test_random_schemas_validate_what_the_model_says(model: pocketmoe.Model, schema: dict[str, Any], seed: int) -> None:
    """Greedy and sampled; an answer that was cut off says so, and any other is valid."""
    for temperature in (0.0, 1.0):
        try:
            answer = model.generate("hello", json_schema=schema, max_tokens=120, temperature=temperature, seed=seed)
        except BadInput:
            assume(False)
            return
        assert answer.constraint == "json_schema"
        assert answer.is_whole == (answer.stop_reason in ("eos", "complete"))
        if answer.is_whole:
            jsonschema.Draft202012Validator(schema).validate(json.loads(answer.text))
        else:
            assert answer.stop_reason == "length"


@FEW
@given(pattern=regexes(), seed=SEEDS)
def test_random_expressions_match_what_the_model_says(model: pocketmoe.Model, pattern: str, seed: int) -> None:
    """Greedy and sampled, by Python's own `re`."""
    for temperature in (0.0, 1.0):
        try:
            answer = model.generate("hello", regex=pattern, max_tokens=80, temperature=temperature, seed=seed)
        except BadInput:
            assume(False)
            return
        assert not answer.is_whole or re.fullmatch(pattern, answer.text)


def test_forced_tokens_change_no_bit(model: pocketmoe.Model) -> None:
    """The log probabilities of an answer with forced tokens are those of its tokens fed one by one."""
    answer = model.generate("hello", json_schema=PERSON, max_tokens=100, logprobs=2)
    assert answer.stop_reason == "complete"
    assert answer.logprobs is not None
    assert [entry.token for entry in answer.logprobs] == list(answer.tokens)
    engine = model.engine
    prompt = model.prompt_ids("hello")
    engine.reset()
    logits = engine.feed(prompt)[-1]
    for entry in answer.logprobs:
        below = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
        assert entry.logprob == float((below - np.log(np.exp(below).sum(axis=-1, keepdims=True)))[entry.token])
        logits = engine.feed([entry.token])[-1]
    assert model.generate("hello", json_schema=PERSON, max_tokens=100).tokens == answer.tokens


def test_tokens_fed_each_are_those_fed_alone(model: pocketmoe.Model) -> None:
    """Logits of tokens that go through the layers together are, bit for bit, those of tokens that go alone."""
    engine, tokens = model.engine, list(range(40, 77))
    engine.reset()
    engine.feed([3, 4, 5])
    together = engine.feed_each(tokens, "all")
    engine.reset()
    engine.feed([3, 4, 5])
    alone = np.concatenate([engine.feed([token]) for token in tokens])
    assert (together == alone).all()
    engine.reset()
    engine.feed([3, 4, 5])
    assert (engine.feed_each(tokens) == alone[-1:]).all()
    assert engine.length == 40


def test_it_holds_beside_everything_that_chooses(model: pocketmoe.Model) -> None:
    """Bias, penalties and least lengths that would rule it out do not; stop strings cut it; a limit is said."""
    for options in (
        {"logit_bias": dict.fromkeys(range(500), -1000.0)},
        {"no_repeat_ngram": 1, "repetition_penalty": 50.0},
        {"min_tokens": 60},
        {"temperature": 1.5, "top_k": 1, "top_p": 0.01, "seed": 3},
    ):
        answer = model.generate("hello", json_schema=PERSON, max_tokens=150, **options)
        assert answer.is_whole, (options, answer.text)
        jsonschema.validate(json.loads(answer.text), PERSON)
    cut = model.generate("hello", json_schema=PERSON, max_tokens=4)
    assert (cut.stop_reason, cut.is_whole, len(cut.tokens)) == ("length", False, 4)
    stopped = model.generate("hello", json_schema=PERSON, stop='"age')
    assert (stopped.stop_reason, stopped.is_whole) == ("stop", False)
    whole = model.generate("hello", regex="(fox|the)( and (fox|the)){3}")
    assert whole.stop_reason == "complete"
    assert not {*whole.tokens} & {*model.bundle.manifest.model.eos_token_ids}
    several = model.generate_many("hello", 3, regex="[a-z]{12}", temperature=1.0, seed=5)
    assert len({answer.text for answer in several}) == 3


def test_memory_for_it_is_set_aside_where_it_is_wanted(root: Path, model: pocketmoe.Model) -> None:
    """It is promised before there are slots; nothing is where it is not wanted."""
    assert model.memory["beside the engine"] > 32 << 20
    assert model.memory["peak"] <= model.memory["budget"]
    with pocketmoe.load(root, memory="50%", structured=False) as without:
        assert "beside the engine" not in without.memory


def test_without_the_extra_it_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says what to install; what needs no grammar goes on."""
    monkeypatch.setattr("pocketmoe.grammar.guide.is_available", lambda: False)
    with pocketmoe.load(root, memory="50%") as fresh:
        with pytest.raises(BadInput, match="llguidance") as refused:
            fresh.generate("hello", regex="a")
        assert "pip install" in refused.value.remedy
        assert fresh.generate("hello", max_tokens=2).tokens


def test_the_command_line_holds_answers(root: Path, tmp_path: Path) -> None:
    """Schema by text and by file, expression, grammar; what cannot be is refused before anything is loaded."""
    (tmp_path / "schema.json").write_text(json.dumps(PERSON))
    (tmp_path / "rules.lark").write_text('start: "yes" | "no"')

    def run(*options: str) -> tuple[int, dict[str, Any], str]:
        done = CliRunner().invoke(
            main, ["run", str(root), "hello", "--json", "--memory", "50%", "--max-tokens", "90", *options]
        )
        return done.exit_code, json.loads(done.stdout) if done.exit_code == 0 else {}, done.stderr

    by_text, by_file = run("--json-schema", json.dumps(PERSON)), run("--json-schema", str(tmp_path / "schema.json"))
    assert by_text[0] == by_file[0] == 0
    assert by_text[1]["text"] == by_file[1]["text"]
    jsonschema.validate(json.loads(by_text[1]["text"]), PERSON)
    assert (by_text[1]["stop_reason"], by_text[1]["constraint"]) == ("complete", "json_schema")
    assert by_text[1]["peak_memory_bytes"] <= by_text[1]["memory_budget_bytes"]
    assert re.fullmatch("[0-9]{3}", run("--regex", "[0-9]{3}")[1]["text"])
    assert run("--grammar", str(tmp_path / "rules.lark"))[1]["text"] in ("yes", "no")
    for options, code, named in (
        (("--json-schema", '{"not": {}}'), 3, "'not'"),
        (("--json-schema", "missing.json"), 3, "missing.json"),
        (("--regex", "("), 3, "unclosed group"),
        (("--grammar", str(tmp_path / "schema.json")), 3, "grammar"),
        (("--regex", "a", "--grammar", "x"), 2, "Choose one"),
    ):
        found = run(*options)
        assert (found[0], named in found[2]) == (code, True), found


def test_the_examples_of_the_page_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of Python in docs/STRUCTURED.md, one after the other, with the tiny bundle in the place of SMALL."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SMALL").symlink_to(root)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["answer"].is_whole
    names["model"].close()


TOOL_TEMPLATE = """{% if tools %}{{ tools[0].function.name }}
{% endif %}{% for message in messages %}{{ message.role }}: {{ message.content }}
{%- for call in message.tool_calls %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}
{% endfor %}assistant:"""
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
                "required": ["n"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("count", "wait")
]


@pytest.fixture(scope="module")
def caller(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[pocketmoe.Model]:
    """The same model, whose template knows tools."""
    copy = tmp_path_factory.mktemp("tools") / "CALLER"
    shutil.copytree(root, copy)
    put(copy, "tokenizer/chat_template.jinja", TOOL_TEMPLATE.encode())
    with pocketmoe.load(copy, memory="50%") as model:
        yield model


def test_tools_are_rendered_called_and_read(caller: pocketmoe.Model, model: pocketmoe.Model) -> None:
    """Required, one named, one at most; arguments keep to the schema; the answer goes back into the template."""
    messages = [{"role": "user", "content": "hello"}]
    called = caller.generate(messages, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, max_tokens=90)
    assert (called.stop_reason, called.constraint, called.content) == ("complete", "tool_calls", "")
    (call,) = called.tool_calls
    assert call.name in ("count", "wait")
    assert 0 <= json.loads(call.arguments)["n"] <= 99
    for choice in ("wait", {"type": "function", "function": {"name": "wait"}}):
        named = caller.generate(messages, tools=TOOLS, tool_choice=choice, max_tokens=90, parallel_tool_calls=False)
        assert [call.name for call in named.tool_calls] == ["wait"]
    past = {"id": "1", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
    again = [*messages, {"role": "assistant", "content": "", "tool_calls": [past]}, {"role": "tool", "content": "7"}]
    assert caller.generate(again, tools=TOOLS, max_tokens=2).prompt_tokens > called.prompt_tokens
    free = caller.generate(messages, tools=TOOLS, max_tokens=5)
    assert free.prompt_tokens > caller.generate(messages, tools=TOOLS, tool_choice="none", max_tokens=5).prompt_tokens
    assert (free.constraint, free.tool_calls) == (None, ())
    with caller.stream(messages, tools=TOOLS, tool_choice="required", max_tokens=90) as stream:
        parser = stream.so_far.speech.parser(stream.so_far.reasoning_begun)
        parts = [part for piece in stream for part in parser.push(piece)] + parser.finish()
    assert [part for part in parts if isinstance(part, ToolCall)] == [*stream.result.tool_calls]
    for wrong in (
        {"tools": TOOLS, "tool_choice": "nobody"},
        {"tool_choice": "required"},
        {"tools": [{}]},
        {"tools": TOOLS, "tool_choice": 3},
    ):
        with pytest.raises(BadInput):
            caller.generate(messages, **wrong)
    with pytest.raises(BadInput, match="knows no tools"):
        model.generate("hello", tools=TOOLS)


def test_content_is_held_beside_tools(caller: pocketmoe.Model) -> None:
    """Left to the model, an answer is a call or content of the schema; required, it is a call, and no content."""
    messages = [{"role": "user", "content": "hello"}]
    for seed in range(2):
        free = caller.generate(messages, tools=TOOLS, json_schema=PERSON, max_tokens=200, temperature=1.0, seed=seed)
        if free.is_whole:
            assert bool(free.tool_calls) != bool(free.content), free.text
            jsonschema.validate(json.loads(free.content or '{"name": "", "age": 0}'), PERSON)
    one: Any = {"tool_choice": "required", "parallel_tool_calls": False}
    held = caller.generate(messages, tools=TOOLS, json_schema=PERSON, max_tokens=200, **one)
    assert held.tool_calls
    assert held.content == ""
    without = caller.generate(messages, tools=TOOLS, json_schema=PERSON, tool_choice="none", max_tokens=200)
    assert without.constraint == "json_schema"
    assert not without.tool_calls
