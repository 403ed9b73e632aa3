"""Chat templates: transformers' own rendering, whatever a template uses, within limits that are counted."""

# pyright: reportArgumentType=false

from __future__ import annotations

import contextlib
import random
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketmoe.chat_template import meter
from pocketmoe.chat_template.template import ChatTemplate
from pocketmoe.errors import BadInput
from tests import chat_templates as templates
from tests.tiny import save_tokenizer

TEMPLATES = templates.FAMILIES | templates.CONSTRUCTS
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' tokenizer, whose post-processor adds a BOS."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"pad_token": "<pad>", "unk_token": "<unk>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    assert tokenizer("a")["input_ids"][0] == 0
    return tokenizer


@pytest.fixture
def meters(monkeypatch: pytest.MonkeyPatch) -> list[meter.Meter]:
    """Every meter that is made, the last one last."""
    made: list[meter.Meter] = []

    class Watched(meter.Meter):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(meter, "Meter", Watched)
    return made


def outcome(render: Callable[[], Any]) -> Any:
    """What it returns; None for an error of any kind."""
    try:
        return render()
    except Exception:  # noqa: BLE001 - a template can raise whatever Python raises
        return None


text = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    [
        "<b>'q' & \"x\"</b>",
        " a \n\n b\t",
        "</think> x",
        "<think>a</think>b",
        "é👩‍🦰\u2028",
        "<s></s>",
        "{{ x }}",
        "%s {0}",
        "",
    ]
)
message = (
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": text},
        optional={"reasoning_content": text | st.none(), "thinking": text, "name": text},
    )
    | st.fixed_dictionaries(
        {"role": st.just("user"), "content": st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": text}))}
    )
    | st.just(templates.CALL)
    | st.fixed_dictionaries(
        {"role": st.just("tool"), "content": text | st.dictionaries(text, st.integers(0, 9), max_size=2)}
    )
)
alternating = st.lists(text, min_size=1, max_size=5).map(
    lambda texts: [{"role": ("user", "assistant")[i % 2], "content": said} for i, said in enumerate(texts)]
)
conversations = alternating | st.lists(message, min_size=1, max_size=5)
variables = st.fixed_dictionaries(
    {},
    optional={
        "enable_thinking": st.booleans(),
        "thinking": st.booleans(),
        "limit": st.integers(),
        "bos_token": st.just("<other>"),
        "tools": st.just(templates.TOOLS) | st.none() | st.just([]),
        "documents": st.just([{"title": "T", "text": "é"}]),
        "add_generation_prompt": st.booleans(),
    },
)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=12, deadline=None)
@given(chat=conversations, given_variables=variables)
def test_rendering_is_that_of_transformers(theirs: Any, name: str, chat: Any, given_variables: dict[str, Any]) -> None:
    """The same text and the same ids for any conversation, or an error from both."""
    options = {"add_generation_prompt": True, **given_variables}
    ours = ChatTemplate({"default": TEMPLATES[name]}, theirs.special_tokens_map, "here")
    found = outcome(lambda: ours.render(chat, **options))
    wanted = outcome(lambda: theirs.apply_chat_template(chat, chat_template=TEMPLATES[name], tokenize=False, **options))
    assert found == (wanted or None)
    if found:
        ids = theirs.apply_chat_template(chat, chat_template=TEMPLATES[name], return_dict=False, **options)
        assert theirs.backend_tokenizer.encode(found, add_special_tokens=False).ids == ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_construct_renders(theirs: Any, name: str) -> None:
    """Each of the templates renders a plain conversation, so that the comparison above does not compare errors."""
    chat = [*USER, {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "a b"}]
    ours = ChatTemplate({"default": TEMPLATES[name]}, theirs.special_tokens_map, "here")
    if name == "private":
        with pytest.raises(BadInput, match="append"):
            ours.render(chat)
    else:
        assert ours.render(chat, tools=templates.TOOLS)


@pytest.mark.parametrize("source", [templates.CHATML, templates.LLAMA, templates.DEEPSEEK])
@pytest.mark.parametrize("last", ["Well, ", "Well", [{"type": "text", "text": "Well "}]])
def test_a_message_is_continued_as_by_transformers(theirs: Any, last: Any, source: str) -> None:
    """Without what the template writes after the last message."""
    chat = [*USER, {"role": "assistant", "content": last}]
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    wanted = outcome(lambda: theirs.apply_chat_template(chat, chat_template=source, tokenize=False, **options))
    ours = ChatTemplate({"default": source}, theirs.special_tokens_map, "here")
    assert outcome(lambda: ours.render(chat, **options)) == wanted


def test_templates_are_chosen_by_name_as_by_transformers(theirs: Any) -> None:
    """`tool_use` for tools where there is one, else `default`; any by its name; a name that is missing is said."""
    sources = {"default": "default{{ tools|length if tools }}", "tool_use": "tools", "rag": "rag"}
    ours = ChatTemplate(sources, {}, "here")
    assert ours.render(USER) == "default"
    assert ours.render(USER, tools=[]) == "tools"
    assert ours.render(USER, template="rag") == "rag"
    assert ChatTemplate({"default": sources["default"]}, {}, "here").render(USER, tools=[{}]) == "default1"
    with pytest.raises(BadInput, match="nothing"):
        ours.render(USER, template="nothing")
    with pytest.raises(BadInput, match="default"):
        ChatTemplate({"rag": "rag"}, {}, "here").render(USER)


@pytest.mark.parametrize("chat", [[], ["text"], [1], [{"role": "user", "content": object()}], [{"role": b"x"}]])
def test_what_is_no_conversation_is_refused(chat: Any) -> None:
    """Nothing but mappings of JSON's types reaches a template."""
    with pytest.raises(BadInput):
        ChatTemplate({"default": "x"}, {}, "here").render(chat)


def refusal(source: str) -> str:
    with pytest.raises(BadInput) as refused:
        ChatTemplate({"default": source}, {"bos_token": "<s>"}, "here").render(USER)
    line = refused.value.one_line()
    assert line.isprintable()
    assert len(line) < 400
    return line


@pytest.mark.parametrize("source", templates.LARGE)
def test_what_would_be_large_is_refused_before_it_is_made(source: str) -> None:
    """No template takes more than 64 MiB for a short conversation."""
    tracemalloc.start()
    try:
        assert "more than" in refusal(source)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20


@pytest.mark.parametrize("source", templates.LONG)
def test_what_would_take_long_ends_at_the_limit_of_steps(
    source: str, meters: list[meter.Meter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same steps every time, whatever the machine does meanwhile."""
    monkeypatch.setattr(meter, "STEPS", 50_000)
    lines = {refusal(source) for _ in range(2)}
    assert len(lines) == 1
    assert len({(used.steps, used.nbytes) for used in meters}) == 1
    assert "more than" in lines.pop()


@pytest.mark.parametrize("source", templates.BROKEN, ids=lambda source: source[:40])
def test_a_broken_template_is_one_line(source: str) -> None:
    """Whatever a template's mistake raises names the template and the remedy."""
    assert "here: the chat template" in refusal(source)
    assert "--raw" in refusal(source)


@pytest.mark.parametrize("name", templates.FAMILIES)
def test_long_conversations_stay_far_from_the_limits(name: str, meters: list[meter.Meter]) -> None:
    """200 messages of 500 kB take less than a tenth of what is allowed, 2,000 less than a fifth."""
    ours = ChatTemplate({"default": templates.FAMILIES[name]}, {"bos_token": "<s>", "eos_token": "</s>"}, "here")
    for messages, share in ((200, 0.1), (2000, 0.2)):
        ours.render(templates.conversation(messages, 500_000), tools=templates.TOOLS)
        assert meters[-1].steps < share * meters[-1].max_steps
        assert meters[-1].nbytes < share * meters[-1].max_bytes


def test_texts_that_are_dropped_are_given_back(meters: list[meter.Meter]) -> None:
    """A template may append message after message: 250 MB are made, but only 1 MB at a time is kept."""
    source = "{% set ns = namespace(s='') %}" + (
        "{% for m in messages %}{% set ns.s = ns.s + m.content %}{% endfor %}{{ ns.s }}"
    )
    chat = templates.conversation(1000, 500_000)
    assert ChatTemplate({"default": source}, {}, "here").render(chat) == "".join(m["content"] for m in chat)
    assert meters[-1].max_bytes < 100e6


def test_threads_have_limits_of_their_own() -> None:
    """A template may render in many threads at once, and what one uses does not count for another."""
    ours = ChatTemplate({"default": templates.QWEN}, {}, "here")
    chats = [templates.conversation(number, 200 * number) for number in range(1, 40)]
    wanted = [ours.render(chat) for chat in chats]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ours.render, chats * 3)) == wanted * 3


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False))
def test_nothing_made_of_pieces_of_templates_escapes(source: random.Random) -> None:
    """Templates made at random of what hostile ones are made of end in a text or in one line."""
    pieces = [*templates.LARGE, *templates.BROKEN, *TEMPLATES.values()]
    cuts = []
    for piece in source.sample(pieces, 3):
        start = source.randrange(len(piece) + 1)
        cuts.append(piece[start : start + source.randrange(200)])
    with contextlib.suppress(BadInput):
        ChatTemplate({"default": "".join(cuts)}, {}, "here").render(USER)


def test_rendering_does_not_change_what_it_is_given() -> None:
    """Messages, tools and variables are copied."""
    chat, tools = (
        [dict(templates.CALL), {"role": "assistant", "content": "x", "thinking": "y", "name": None}],
        templates.TOOLS,
    )
    before = repr((chat, tools))
    ChatTemplate({"default": templates.CONSTRUCTS["reasoning"]}, {}, "here").render(chat, tools=tools)
    assert repr((chat, tools)) == before


def test_no_file_is_read(tmp_path: Path) -> None:
    """A template has no loader."""
    (tmp_path / "x").write_text("secret")
    assert "no loader" in refusal("{% include '" + str(tmp_path / "x") + "' %}")
