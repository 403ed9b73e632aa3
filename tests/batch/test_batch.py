"""`run --batch`: every prompt of a file is answered as it is alone, once, whatever ends the process in between."""

# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketmoe.batch.answering import BatchRequest, answer_batch
from pocketmoe.batch.prompts import BatchPrompt, read_prompts
from pocketmoe.batch.results import Results, in_order, key_of
from pocketmoe.bundle.reader import Bundle
from pocketmoe.cli import main
from pocketmoe.errors import BadInput
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.model import LoadRequest, Model
from tests.hang import HANG_S

LOAD = LoadRequest(MemoryRequest.parse("60%"))
OPTIONS: dict[str, Any] = {"max_tokens": 6, "temperature": 1.0, "seed": 3}
PROMPTS = [f"once upon {word}" for word in ("a time", "the hill", "this day", "that fox", "no one")]


@pytest.fixture(scope="module")
def root(tiny_bundle: Callable[[str], Bundle]) -> Path:
    return tiny_bundle("olmoe").root


@pytest.fixture(scope="module")
def alone(root: Path) -> list[tuple[int, ...]]:
    """The tokens of each prompt's answer, asked for by itself."""
    with Model(root, LOAD) as model:
        return [model.generate(prompt, **OPTIONS).tokens for prompt in PROMPTS]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n".join(PROMPTS) + "\n")
    return file


def refuse(prompt: BatchPrompt, error: BadInput) -> None:
    raise AssertionError((prompt, error))


def answers(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["run", *map(str, arguments)])


@pytest.mark.parametrize("at_once", [1, 3])
def test_each_is_answered_as_alone(
    at_once: int, root: Path, prompts: Path, tmp_path: Path, alone: list[tuple[int, ...]]
) -> None:
    """In the order of the prompts, with their ids; a second start has nothing to do and changes nothing."""
    request = BatchRequest(prompts, tmp_path / "out.jsonl", LOAD, OPTIONS, at_once=at_once)
    seen: list[dict[str, Any]] = []
    report = answer_batch(root, request, seen.append, refuse)
    found = answers(tmp_path / "out.jsonl")
    assert [tuple(record["tokens"]) for record in found] == alone
    assert [record["id"] for record in found] == [1, 3, 5, 7, 9]
    assert sorted(record["id"] for record in seen) == [1, 3, 5, 7, 9]
    assert (report.answered, report.refused, report.generated_tokens) == (5, 0, sum(map(len, alone)))
    before = (tmp_path / "out.jsonl").read_bytes()
    again = answer_batch(root, request, refuse_record, refuse)
    assert (again.answered, again.answered_before) == (0, 5)
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.txt"]


def refuse_record(record: dict[str, Any]) -> None:
    raise AssertionError(record)


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_kill_loses_what_was_being_answered(
    at_once: int, root: Path, prompts: Path, tmp_path: Path, alone: list[tuple[int, ...]]
) -> None:
    """After SIGKILL at the third answer the same request answers the rest, and the file is as if nothing had been."""
    out = tmp_path / "out.jsonl"
    request = BatchRequest(prompts, out, LOAD, OPTIONS, at_once=at_once)
    child = os.fork()
    if not child:
        count = iter(range(9))
        answer_batch(
            root, request, lambda _: os.kill(os.getpid(), signal.SIGKILL) if next(count) == 2 else None, refuse
        )
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(answers(out)) == 3
    with open(out, "ab") as file:
        file.write(b'{"id": 9, "ke')  # a kill within a write
    report = answer_batch(root, request, lambda _: None, refuse)
    assert (report.answered, report.answered_before) == (2, 3)
    assert [tuple(record["tokens"]) for record in answers(out)] == alone


def test_what_changed_is_refused(root: Path, prompts: Path, tmp_path: Path) -> None:
    """Another prompt under an id, another option, another file: exit 3, nothing is lost; more prompts are answered."""
    out = tmp_path / "out.jsonl"
    options = (root, "--batch", prompts, "-o", out, "--max-tokens", 3, "--memory", "60%")
    assert command(*options).exit_code == 0
    before = out.read_bytes()
    for change in (["--temperature", "0.5"], ["--system", "be nice"], ["--raw"], ["--stop", "x"], ["--drop-cold", "1"]):
        done = command(*options, *change)
        assert done.exit_code == 3, (change, done.output)
        assert "line 1: answers another prompt" in done.stderr
    prompts.write_text(prompts.read_text().replace("a time", "a tome"))
    assert "line 1: answers another prompt" in command(*options).stderr
    prompts.write_text("only one\n")
    assert command(*options).exit_code == 3
    prompts.write_text("\n\n".join([*PROMPTS, "and more"]) + "\n")
    for foreign in (prompts, "/dev/null", tmp_path):
        done = command(root, "--batch", prompts, "-o", foreign, "--max-tokens", 3, "--memory", "60%")
        assert done.exit_code == 3, done.output
    assert out.read_bytes() == before
    done = command(*options, "--memory", "80%", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["answered"] == 1
    assert out.read_bytes().startswith(before)


def test_prompts_that_cannot_be_answered_do_not_stop_the_others(root: Path, tmp_path: Path) -> None:
    """They are named, the exit code is 3 in the end, and the next start, with room for them, answers them alone."""
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    lines: list[dict[str, Any]] = [
        {"id": "short", "prompt": "hello", "label": 7},
        {"id": "long", "prompt": "hello " * 20},
        {"id": "talk", "messages": [{"role": "user", "content": "hello"}]},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    options = (root, "--batch", file, "-o", out, "--max-tokens", 4, "--memory", "60%", "-q")
    done = command(*options, "--context", 60)
    assert done.exit_code == 3
    assert "Prompt 'long'" in done.stderr
    assert "1 of 3 prompts were refused" in done.stderr
    assert [record["id"] for record in answers(out)] == ["short", "talk"]
    done = command(*options)
    assert done.exit_code == 0, done.stderr
    assert [record["id"] for record in answers(out)] == ["short", "long", "talk"]
    assert done.stdout == done.stderr == ""


def test_answers_go_to_standard_output_too(root: Path, prompts: Path) -> None:
    """As JSON lines, with several answers and their log probabilities where they are asked for."""
    options = ("--max-tokens", 3, "--temperature", 1, "--seed", 1, "-n", 2, "--logprobs", 1, "--memory", "60%")
    done = command(root, "--batch", prompts, *options, "-q")
    assert done.exit_code == 0, done.output
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 5
    for record in found:
        first, second = record["answers"]
        assert first["tokens"] == record["tokens"]
        assert first["tokens"] != second["tokens"]
        assert [entry["token"] for entry in first["logprobs"]] == first["tokens"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.txt", "\n \n", "holds no prompts"),
        ("p.jsonl", "hello", "line 1"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": 3}', "line 3"),
        ("p.jsonl", '{"prompt": "a", "messages": [{"role": "user"}]}', "a prompt and messages"),
        ("p.jsonl", '{"id": 4}', "neither a prompt nor messages"),
        ("p.jsonl", '{"prompt": ""}', "neither a prompt nor messages"),
        ("p.jsonl", '{"messages": [{"content": "x"}]}', "without a role"),
        ("p.jsonl", '{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}', "lines 1 and 2: both have the id 'x'"),
        ("p.jsonl", '{"prompt": "a", "id": 2}\n{"prompt": "b"}', "both have the id 2"),
        ("p.jsonl", "[" * 100_000, "line 1"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(name: str, text: str, words: str, tmp_path: Path) -> None:
    """Before a model is loaded, and by its line."""
    (tmp_path / name).write_text(text)
    done = command("nowhere", "--batch", tmp_path / name)
    assert done.exit_code == 3
    assert words in done.stderr or "nowhere" in done.stderr
    with pytest.raises(BadInput, match=words):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize("arguments", [["hello", "--batch", "f"], ["-o", "f", "hello"], ["--sequences", 2, "hello"],
                                       ["--batch", "f", "--trace", "t"], ["hello", "-n", 2], ["--context", 9, "x"],
                                       ["--batch", "f", "--sequences", 0]])  # fmt: skip
def test_options_that_do_not_go_together_are_usage(arguments: list[object]) -> None:
    assert command("nowhere", *arguments).exit_code == 2


@settings(deadline=None)
@given(order=st.permutations(range(6)), data=st.data())
def test_a_file_cut_anywhere_is_gone_on_with(
    order: list[int], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever byte a kill or a full disk cuts it at, whole lines count, and in the end it has all in order."""
    path = tmp_path_factory.mktemp("batch") / "out.jsonl"
    asked = [BatchPrompt(number, f"prompt {number}") for number in range(6)]
    keys = {prompt.id: key_of(prompt, {}, "seal") for prompt in asked}
    with Results(path, keys) as results:
        for number in order:
            results.add({"id": number, "key": keys[number], "text": f"answer\n{number} \u2028"})
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    with Results(path, keys) as results:
        assert results.done == {*order[: whole[:cut].count(b"\n")]}
        for number in order:
            if number not in results.done:
                results.add({"id": number, "key": keys[number], "text": f"answer\n{number} \u2028"})
        with pytest.raises(BadInput, match="another process"):
            Results(path, keys)
    assert path.read_bytes() == whole
    in_order(path, asked)
    assert [record["id"] for record in answers(path)] == [*range(6)]
    assert len(path.read_bytes()) == len(whole)


def test_ctrl_c_keeps_what_is_answered(root: Path, prompts: Path, tmp_path: Path) -> None:
    """Interrupted between answers it ends, several at once too, and what is on the disk is whole."""
    out = tmp_path / "out.jsonl"
    request = BatchRequest(prompts, out, LOAD, OPTIONS, at_once=2)

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_batch(root, request, interrupt, refuse)
    assert len(answers(out)) == 1
    assert answer_batch(root, request, lambda _: None, refuse).answered == 4


def test_a_full_disk_leaves_whole_lines(root: Path, prompts: Path, tmp_path: Path) -> None:
    """Exit 3, no half line; with room again the rest is answered."""
    import resource
    import subprocess
    import sys

    out = tmp_path / "out.jsonl"
    arguments = ["run", root, "--batch", prompts, "-o", out, "--max-tokens", 4, "--memory", "60%"]
    done = subprocess.run(
        [sys.executable, "-m", "pocketmoe", *map(str, arguments)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700)),
        capture_output=True, text=True, check=False, timeout=HANG_S,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "out.jsonl" in done.stderr
    assert 0 < len(answers(out)) < 5
    assert command(*arguments[1:]).exit_code == 0
    assert len(answers(out)) == 5
