"""`pocketmoe chat` as a pipe, and its loop with a model that stands in."""

# pyright: reportMissingParameterType=false

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from pocketmoe.bundle.reader import Bundle
from pocketmoe.cli import main
from pocketmoe.console.chat import ChatLoop, figures
from pocketmoe.runtime.conversation import Generation
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.model import LoadRequest, Model
from pocketmoe.runtime.sampling import Sampling
from tests.bundles import write_bundle
from tests.cgroup import run_limited


@pytest.fixture(scope="module")
def root(tiny_bundle: Callable[[str], Bundle], tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("chat") / "TINY"
    shutil.copytree(tiny_bundle("olmoe").root, copy, ignore=shutil.ignore_patterns("packed"))
    return copy


def talk(root: Path, *lines: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pocketmoe", "chat", str(root), "--memory", "50%", *options]
    text = "".join(f"{line}\n" for line in lines)
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=300)


def test_a_pipe_gets_answers_alone(root: Path, tmp_path: Path) -> None:
    """Every command is understood, what is wrong is a line, and stdout has nothing but the answers."""
    saved = tmp_path / "talk.json"
    done = talk(
        root, "hello there", "/stats", "what now \\", "and then?", f"/save {saved}", "/memory", "/undo", "/retry",
        f"/load {saved}", "/load nothing", "/nope", "/set top_p 7", "/set foo 1", "/set temperature 0.5",
        "/system be nice", "/reset", "/help", f"/save {root / 'manifest.json'}", "/quit", "never said",
        options=("--max-tokens", "8", "--temperature", "0"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 3
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    for words in ("tokens of context", " of 256", "prompt_tokens", "Took back: what now", "4 messages",
                  "nothing cannot be read", "there is no /nope", "not in the range", "there is no setting 'foo'",
                  "temperature 0.5", "be nice", "begins anew", "/retry", "not a saved conversation"):  # fmt: skip
        assert words in done.stderr, (words, done.stderr)
    assert "Traceback" not in done.stderr
    assert Bundle.open(root)


def test_a_bundle_without_a_template_is_refused_before_it_is_packed(tmp_path: Path) -> None:
    """Its graphs cannot be loaded at all; and it is called by its id where it lies in the hub's cache."""
    root = tmp_path / "models--me--a--b/snapshots/0123456789"
    root.parent.mkdir(parents=True)
    write_bundle(root)
    done = CliRunner().invoke(main, ["chat", str(root)])
    assert (done.exit_code, done.stdout) == (3, "")
    assert done.stderr == f"Error: {root} has no chat template. It goes on with texts instead: pocketmoe run.\n"
    assert Bundle.open(root).name == "me/a--b"
    assert Bundle.open(root.rename(tmp_path / "SMALL")).name == "SMALL"


def test_variables_of_the_template_are_set(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As JSON where a value is that, and shown; what the template does not have, or is ours to give, is refused."""
    asked: list[object] = []
    with Model(root, LoadRequest(context=200)) as model:
        chat = model.chat(temperature=0, max_tokens=2)
        model.template_mentions = lambda variable: variable in ("enable_thinking", "mood")  # type: ignore[method-assign]
        stream = chat.stream
        chat.stream = lambda text, **options: asked.append(dict(chat.options["template"])) or stream(text, **options)  # type: ignore[method-assign,func-returns-value]
        lines = iter(["/set template.enable_thinking false", "/set template.mood calm", "hello", "/set template.mood",
                      "hello", "/set template.nothing 1", "/set template.messages 1", "/set template.a-b 1",
                      None])  # fmt: skip
        ChatLoop(model, chat, lambda: next(lines), 80).run()
    said = capsys.readouterr().err
    assert asked == [{"enable_thinking": False, "mood": "calm"}, {"enable_thinking": False}]
    assert "template.enable_thinking false" in said
    assert 'template.mood "calm"' in said
    assert "has no nothing" in said
    assert said.count("no variable that a chat template could be given") == 2


def test_a_full_context_is_said_and_nothing_is_dropped(root: Path) -> None:
    """An answer that fills the context, and then a question that no longer fits; undone, the talk goes on."""
    done = talk(
        root, "hello " * 20, "and?", "/undo", "/reset", "hello", options=("--context", "64", "--min-tokens", "64")
    )
    assert done.returncode == 0, done.stderr
    assert "The context is full" in done.stderr
    assert "the context holds 64. Nothing was dropped" in done.stderr


def test_ctrl_c_stops_the_answer_and_not_the_program(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The signal ends the answer early; what there was stays in the conversation, and the next line is read."""
    with Model(root, LoadRequest(context=200)) as model:
        chat = model.chat(temperature=0, min_tokens=100, max_tokens=100)
        lines = iter(["once upon a time", "/stats", None])
        loop = ChatLoop(model, chat, lambda: next(lines), 80)
        given = 0

        def interrupt(result: object) -> object:
            nonlocal given
            given += 1
            if given == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return result

        stream = chat.stream
        chat.stream = lambda text, **options: Interrupting(stream(text, **options), interrupt)  # type: ignore[method-assign]
        loop.run()
        assert chat.messages[-1]["role"] == "assistant"
        assert "stop_reason stopped" in capsys.readouterr().err


@pytest.mark.root
@pytest.mark.slow
def test_a_long_talk_stays_within_its_budget(root: Path) -> None:
    """40 turns with forks, resets and streams left early, in a memory cgroup of the budget: the same tokens at each."""
    with Model(root, LoadRequest(MemoryRequest.parse("50%"))) as model:
        enough = model.memory["budget"]
    rows = []
    for budget in (enough, enough + 20 * 10**6):
        script = [sys.executable, str(Path(__file__).with_name("talk.py")), str(root), f"{budget}B", "40"]
        done = run_limited(script, budget)
        assert done.returncode == 0, done.stderr
        rows.append(json.loads(done.stdout))
        assert 0 < rows[-1]["peak"] <= budget
        assert done.peak_bytes is None or done.peak_bytes <= budget
        assert rows[-1]["full"] > 0
    assert rows[0]["sha256"] == rows[1]["sha256"]


class Interrupting:
    """A stream that calls something after each piece."""

    def __init__(self, stream, after):
        self._stream, self._after = stream, after

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def __iter__(self):
        return self

    def __next__(self):
        return self._after(next(self._stream))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stream.close()


def test_the_figures_fit_the_terminal() -> None:
    """One line, at 50 columns and at 120."""
    result = Generation(
        text="", tokens=(1,) * 90, stop_reason="eos", prompt_tokens=900, reused_tokens=0, ttft_s=12.3,
        decode_tokens_per_s=123.4, total_s=1.0, expert_hit_rate=0.876, bytes_read=1, peak_memory_bytes=3_900_000_000,
        memory_budget_bytes=4_000_000_000, context_used=4000, context_length=4096, sampling=Sampling(),
    )  # fmt: skip
    for width in (50, 120):
        assert len(figures(result, width)) <= width
    assert "tokens/s" in figures(result, 120)
