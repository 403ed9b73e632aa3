"""The Python API, on the tiny bundle: answers, streams, conversations, threads, memory."""

# pyright: reportArgumentType=false

from __future__ import annotations

import gc
import re
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pocketmoe
from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import BadInput, BudgetTooSmall, ContextFull

PAGE = Path(__file__).parents[1] / "docs" / "PYTHON.md"


@pytest.fixture(scope="module")
def root(tiny_bundle: Callable[[str], Bundle], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that may be packed."""
    copy = tmp_path_factory.mktemp("api") / "TINY"
    shutil.copytree(tiny_bundle("olmoe").root, copy, ignore=shutil.ignore_patterns("packed"))
    return copy


@pytest.fixture(scope="module")
def model(root: Path) -> Iterator[pocketmoe.Model]:
    with pocketmoe.load(root, memory="50%") as model:
        yield model


def test_importing_costs_next_to_nothing() -> None:
    """The names are there, what is behind them is not: no numpy, no ONNX Runtime."""
    code = """
import sys, pocketmoe
assert {"load", "export", "quantize", "evaluate", "plan"} <= set(dir(pocketmoe))
assert not {"numpy", "onnxruntime", "tokenizers", "torch"} & set(sys.modules)
import pocketmoe.export.checkpoint
assert callable(pocketmoe.export) and callable(pocketmoe.load) and callable(pocketmoe.quantize)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_answer_is_its_stream_and_comes_again_from_its_prefix(model: pocketmoe.Model) -> None:
    """Pieces make the text; the same prompt gives the same tokens, and reuses what it can; the record adds up."""
    prompt = "The quick brown fox. " * 10
    first = model.generate(prompt, max_tokens=8)
    with model.stream(prompt, max_tokens=8) as stream:
        assert "".join(stream) == first.text == stream.result.text
    again = stream.result
    assert again.tokens == first.tokens
    assert again.reused_tokens == (again.prompt_tokens - 1) // 128 * 128
    assert again.context_used == again.prompt_tokens + len(again.tokens) <= again.context_length
    assert again.peak_memory_bytes <= again.memory_budget_bytes
    assert (first.stop_reason, len(first.tokens)) == ("length", 8)


def test_a_stream_says_what_is_known_so_far(model: pocketmoe.Model) -> None:
    """The prompt's length at once, tokens and their log probabilities as they come; each token has some text."""
    with model.stream("once upon a time", max_tokens=12, min_tokens=12, logprobs=1) as stream:
        length = stream.so_far.prompt_tokens
        assert length > 0
        assert not stream.so_far.tokens
        seen = [len(stream.so_far.tokens) for _ in stream]
        assert len(stream.so_far.tokens) == len(stream.so_far.logprobs) == 12
    assert seen == sorted(seen)
    assert seen[0] < 12
    assert (length, tuple(stream.so_far.tokens)) == (stream.result.prompt_tokens, stream.result.tokens)
    assert all(model.token_text(token) for token in model.tokenize("once upon a time"))


def test_a_closed_stream_stops_the_work_and_lets_the_next_one_in(model: pocketmoe.Model) -> None:
    """Closed, left by break, or dropped: then its place is free. Open, it ends before the next call of its thread."""
    alone = model.generate("once upon a time", max_tokens=12)
    stream = model.stream("once upon a time", max_tokens=12)
    first = next(stream)
    assert (model.active, model.waiting) == (1, 0)
    assert model.generate("hello", max_tokens=2).tokens
    assert first + "".join(stream) == alone.text
    assert stream.result.tokens == alone.tokens
    stream = model.stream("once upon a time", max_tokens=50)
    next(stream)
    stream.close()
    assert (model.active, model.waiting) == (0, 0)
    assert stream.result.stop_reason == "stopped"
    assert 0 < len(stream.result.tokens) < 50
    gc.disable()  # a stream is no part of a cycle: it is closed as soon as nobody has it
    try:
        for _ in model.stream("once upon", max_tokens=50):
            break
        assert model.generate("hello", max_tokens=2).text is not None
    finally:
        gc.enable()


def test_threads_wait_for_each_other(model: pocketmoe.Model) -> None:
    """Eight threads with prompts of their own get what they get alone."""
    prompts = [f"number {index} goes out" for index in range(8)]
    alone = [model.generate(prompt, max_tokens=6).tokens for prompt in prompts]
    found: dict[int, tuple[int, ...]] = {}

    def ask(index: int) -> None:
        found[index] = model.generate(prompts[index], max_tokens=6).tokens

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(8)] == alone


def test_a_conversation_keeps_forks_saves_and_loads(model: pocketmoe.Model, tmp_path: Path) -> None:
    """A turn sees the turns before; a fork goes its own way; a saved text is its owner's, and comes back whole."""
    chat = model.chat("be brief", max_tokens=5, temperature=0)
    first = chat.say("hello")
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]
    assert chat.messages[-1]["content"] == first.content
    other = chat.fork()
    assert chat.say("and now?").tokens == other.say("and now?").tokens
    chat.undo()
    chat.save(tmp_path / "talk.json")
    assert stat.S_IMODE((tmp_path / "talk.json").stat().st_mode) == 0o600
    loaded = model.chat(max_tokens=5, temperature=0)
    loaded.load(tmp_path / "talk.json")
    assert loaded.messages == chat.messages
    assert (
        loaded.say("and now?").tokens
        == model.generate([*chat.messages, {"role": "user", "content": "and now?"}], max_tokens=5).tokens
    )
    (tmp_path / "bad.json").write_text('{"messages": 3}')
    with pytest.raises(BadInput, match="not a saved conversation"):
        loaded.load(tmp_path / "bad.json")
    chat.reset()
    assert [message["role"] for message in chat.messages] == ["system"]


def test_a_full_context_is_said_and_changes_nothing(model: pocketmoe.Model) -> None:
    """A prompt without room raises; an answer that fills the context says so; the conversation stays as it was."""
    chat = model.chat(max_tokens=None, temperature=0)
    before = list(chat.messages)
    with pytest.raises(ContextFull):
        chat.say("hello " * 400)
    assert chat.messages == before
    full = model.generate(list(range(5, 200)), max_tokens=None, min_tokens=200)
    assert (full.stop_reason, full.context_used) == ("context", full.context_length)


def test_stops_logprobs_and_several_answers(model: pocketmoe.Model) -> None:
    """A stop string cuts the text before it; log probabilities belong to the tokens; seeds make answers differ."""
    prompt = "The little girl"
    whole = model.generate(prompt, max_tokens=20, logprobs=3)
    stop = whole.text[4:7]
    cut = model.generate(prompt, max_tokens=20, stop=stop)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.stop_reason == "stop"
    assert whole.logprobs is not None
    assert [entry.token for entry in whole.logprobs] == list(whole.tokens)
    assert all(entry.top[0][0] == entry.token and len(entry.top) == 3 for entry in whole.logprobs)
    ids = model.tokenize("a fox in the forest")
    scored = model.logprobs(ids)
    assert [entry.token for entry in scored] == ids[1:]
    assert all(entry.logprob <= 0 for entry in scored)
    several = model.generate_many(prompt, 3, max_tokens=12, temperature=1.0, seed=1)
    assert len({answer.tokens for answer in several}) > 1
    assert several[1].tokens == model.generate(prompt, max_tokens=12, temperature=1.0, seed=2).tokens


def test_errors_are_those_of_the_errors_module(root: Path, tmp_path: Path) -> None:
    """A missing bundle, a budget that is too small, a size that is none."""
    for wrong, error in (
        ({"memory": "20MB"}, BudgetTooSmall),
        ({"memory": "much"}, BadInput),
        ({"context": 1}, BadInput),
    ):
        with pytest.raises(error):
            pocketmoe.load(root, **wrong)
    with pytest.raises(BadInput):
        pocketmoe.load(tmp_path / "none")
    model = pocketmoe.load(root)
    model.close()
    model.close()
    with pytest.raises(BadInput, match="closed"):
        model.generate("hello")


def test_the_commands_functions_refuse_as_the_commands_do(root: Path, tmp_path: Path) -> None:
    """Called by their names in the package, which are those of packages too; nothing is left behind."""
    out = tmp_path / "out"
    for wrong in (
        lambda: pocketmoe.quantize(tmp_path / "none", out),
        lambda: pocketmoe.quantize(root, out, scheme="mixed"),
        lambda: pocketmoe.quantize(root, out, formats={"experts": "zz"}),
        lambda: pocketmoe.quantize(root, out, size_budget="much"),
        lambda: pocketmoe.export("nowhere", out),
        lambda: pocketmoe.export("nowhere", out, workers=1),
        lambda: pocketmoe.evaluate(root, tmp_path / "none.txt"),
        lambda: pocketmoe.plan(tmp_path / "none", device="orin-nano-8gb"),
    ):
        with pytest.raises(BadInput):
            wrong()
    assert not out.exists()
    assert pocketmoe.plan(root, device="orin-nano-8gb", context=128).recommended is not None


def test_the_examples_of_the_page_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of Python in docs/PYTHON.md, one after the other, with the tiny bundle in the place of SMALL."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SMALL").symlink_to(root)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
