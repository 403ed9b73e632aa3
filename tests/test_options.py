"""Every option of every command against what nobody can mean: refused as usage, before anything is loaded."""

from __future__ import annotations

import mmap
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from pocketmoe import sizes
from pocketmoe.cli import main
from pocketmoe.commands.quantize import SizeBudgetType
from pocketmoe.console import numbers
from pocketmoe.errors import BadInput
from pocketmoe.profiles.quality.journal import Journal
from pocketmoe.profiles.quality.quality import read_slices
from pocketmoe.runtime.memory import budget
from pocketmoe.runtime.trace import info_path, read_trace
from tests.profiles.profiles import make_profile
from tests.profiles.profiles import write as write_profile
from tests.runnable import write_bundle

NUMERIC = (
    click.IntRange,
    click.FloatRange,
    numbers.ByteSize,
    numbers.MemorySize,
    numbers.Rates,
    numbers.Users,
    numbers.Workers,
    SizeBudgetType,
)
NONSENSE = [
    "nan", "inf", "-inf", "-1", "1e308", "1e400", "9" * 400, "9" * 5000, "", " ", "x", "٣", "²", "1_000", "1\0",
    "0x10", "1,", "\udcff", "--", "1e-320",
]  # fmt: skip


class Began(Exception):
    """A command's body was reached."""


@pytest.fixture
def bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command only says that it began."""

    def begin(**_: Any) -> None:
        raise Began

    for command in main.commands.values():
        monkeypatch.setattr(command, "callback", begin)


NUMBERS = [
    pytest.param(command, option, id=f"{name} {option.opts[0]}")
    for name, command in main.commands.items()
    for option in command.params
    if isinstance(option.type, NUMERIC)
]


def invoke(command: click.Command, option: click.Parameter | None, value: str) -> Result:
    """The command with this one value, and something for all else that it requires."""
    words = [command.name or ""]
    for other in command.params:
        if isinstance(other, click.Option) and (other.required or other is option):
            words += [f"{max(other.opts, key=len)}={value if other is option else 'this'}"]
    arguments = [p for p in command.params if isinstance(p, click.Argument) and (p.required or p is option)]
    return CliRunner().invoke(main, [*words, "--", *(value if p is option else "nowhere" for p in arguments)])


@pytest.mark.usefixtures("bodies")
@pytest.mark.parametrize(("command", "option"), NUMBERS)
def test_nonsense_for_a_number_is_usage(command: click.Command, option: click.Option) -> None:
    """Exit 2 and a line that names the option, whatever number was meant to be there; the body is never reached."""
    for value in NONSENSE:
        found = invoke(command, option, value)
        assert found.exit_code == 2, (value, found.stderr, found.exception)
        assert isinstance(found.exception, SystemExit), value
        assert option.opts[-1] in found.stderr, value
        assert len(found.stderr) < 700, value


@pytest.mark.usefixtures("bodies")
def test_every_default_and_every_end_of_a_range_is_taken() -> None:
    """The other way round: what the help says is possible reaches the command."""
    for name, command in main.commands.items():
        plain = invoke(command, None, "")
        assert "Began" in plain.stderr, (name, plain.stderr)
        for option in command.params:
            if isinstance(option.type, click.IntRange | click.FloatRange):
                assert option.type.min is not None, option.opts
                assert option.type.max is not None, option.opts
                for end in (1e-9 if option.type.min_open else option.type.min, option.type.max):
                    assert "Began" in invoke(command, option, f"{end}").stderr, (name, option.opts, end)


@given(st.decimals(1, 10**6, places=3), st.sampled_from(["", " "]), st.data())
def test_sizes_are_what_docker_systemd_and_we_mean(number: Any, space: str, data: st.DataObject) -> None:
    """K, M, G, T alone count by 1024, as with i and iB; kB, MB, GB, TB by 1000; case does not matter."""
    letter = data.draw(st.sampled_from("KMGT"))
    power = 1 + "KMGT".index(letter)
    for unit, base in ((letter, 1024), (f"{letter}i", 1024), (f"{letter}iB", 1024), (f"{letter}B", 1000)):
        for written in (unit, unit.lower()):
            expected = int(number * base**power)
            if expected > 1 << 60:
                continue
            assert abs(sizes.parse_size(f"{number}{space}{written}") - expected) <= expected * 1e-12 + 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("4", "did you mean 4GB?"),
        ("0.5", "did you mean 0.5GB, or 50%?"),
        ("40", "did you mean 40GB, or 40%?"),
        ("999999", "did you mean"),
        ("0", "nothing is not enough"),
        ("0MB", "less than a byte"),
        ("0.2B", "less than a byte"),
        ("101%", "more than all"),
        ("9999999TB", "more than any machine has"),
    ],
)
def test_sizes_that_nobody_means_are_asked_about(text: str, words: str) -> None:
    """`--memory 4` is no budget of four bytes, and 0 is not "no limit"."""
    found = invoke(main.commands["run"], next(p for p in main.commands["run"].params if p.name == "memory"), text)
    assert found.exit_code == 2
    assert words in found.stderr


@pytest.mark.usefixtures("bodies")
def test_more_than_the_machine_has_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget beyond what there is gets a word, and is no error; one below gets none."""
    monkeypatch.setattr(budget, "machine_bytes", lambda: 8 * 10**9)
    option = next(p for p in main.commands["run"].params if p.name == "memory")
    assert (
        "16GB is more than this process can have here: 8.00 GB" in invoke(main.commands["run"], option, "16GB").stderr
    )
    assert "more than" not in invoke(main.commands["run"], option, "8GB").stderr
    monkeypatch.setattr(budget, "machine_bytes", lambda: 300 * 10**6 // mmap.PAGESIZE * mmap.PAGESIZE)  # a cgroup's
    assert "more than" not in invoke(main.commands["run"], option, "300MB").stderr


UNREADABLE = ["fifo", "directory", "device", "missing", "no UTF-8", "too large", "dangling link", "socket", "\udcff"]
READ = {  # where a command reads a file of the user's, in words around it
    ("run", "file"): "run BUNDLE -f",
    ("run", "messages"): "run BUNDLE --messages",
    ("run", "batch"): "run BUNDLE --batch",
    ("run", "grammar"): "run BUNDLE -p words --grammar",
    ("chat", "saved"): "chat BUNDLE --load",
    ("eval", "text"): "eval BUNDLE --text",
    ("eval", "pairs"): "eval BUNDLE --text TEXT --pairs",
    ("eval", "gate"): "eval BUNDLE --text TEXT --gate",
    ("replay", "trace"): "replay",
    ("quantize", "calibration"): "quantize BUNDLE -o OUT --calibration",
    ("serve", "api_key_file"): "serve BUNDLE --api-key-file",
    ("compare", "profile"): "compare --json",
    ("compare", "plan"): "compare --json --plan",
    ("compare", "prices"): "compare --json PROFILE --prices",
    ("compare", "measurement"): "compare --json PROFILE --measurement",
    ("compare", "api_key_file"): "compare --json PROFILE --endpoint http://127.0.0.1:9 --model m --api-key-file",
    ("plan", "model"): "plan --device laptop-16gb",
    ("profile", "devices"): "profile BUNDLE -o OUT --devices",
    ("plan", "devices"): "plan BUNDLE --device laptop-16gb --devices",
}
# what is written, bundles, and what is opened elsewhere: the journal, and the text that a worker of `profile` reads
OTHERS = {"output", "packed", "write_sky", "bundle", "bundles", "reference", "checkpoint"}
OTHERWISE = {
    ("run", "trace"), ("eval", "resume"), ("eval", "task_dir"), ("profile", "text"), ("prefix-cache", "directory"),
    ("packed", "directory"),
    ("run", "prefix_cache"), ("chat", "prefix_cache"), ("serve", "prefix_cache"),
}  # fmt: skip


def make(kind: str, folder: Path) -> Path:
    """A path of that kind that is no file which a command could want."""
    path = folder / ("name\udcff" if kind == "\udcff" else "it.txt")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "no UTF-8":
        path.write_bytes(b"\xff\xfe" * 40)
    elif kind == "too large":
        path.touch()
        os.truncate(path, 1 << 40)
    elif kind == "dangling link":
        path.symlink_to(folder / "nowhere")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    return path


def test_no_path_of_any_command_was_forgotten() -> None:
    """A new option that names a file is read by the reader of users' files, or is written, or a bundle."""
    paths = {
        (name, option.name)
        for name, command in main.commands.items()
        for option in command.params
        if isinstance(option.type, click.Path)
    }
    assert {path for path in paths if path[1] not in OTHERS} == {*READ, *OTHERWISE}


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """A read that blocks ends in an error, not in a suite that hangs."""

    def late(*_: object) -> None:
        raise TimeoutError("a read that blocks")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("kind", UNREADABLE, ids=ascii)
@pytest.mark.parametrize("words", READ.values(), ids=lambda words: words.replace(" ", "_"))
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str, words: str) -> None:
    """Neither a FIFO that blocks nor a device that never ends nor a terabyte is read: one line, exit 3."""
    path = make(kind, tmp_path)
    text = tmp_path / "text"
    text.write_text("some text")
    profile = write_profile(tmp_path, make_profile())
    names = {
        "BUNDLE": write_bundle(tmp_path / "bundle").root,
        "TEXT": text,
        "OUT": tmp_path / "out",
        "PROFILE": profile,
    }
    found = CliRunner().invoke(main, [*(str(names.get(word, word)) for word in words.split()), str(path)])
    assert found.exit_code == 3, (found.stderr, found.exception)
    assert len(found.stderr.strip().splitlines()) == 1
    assert path.name.replace("\udcff", "?") in found.stderr
    assert found.stdout == ""


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "too large", "socket"])
def test_what_is_no_file_is_no_journal_either(tmp_path: Path, kind: str) -> None:
    """`eval --resume` refuses it, and leaves it as it is."""
    path = make(kind, tmp_path)
    before = path.lstat()
    with pytest.raises(BadInput) as caught:
        Journal(path, {"a": 1})
    assert path.name in caught.value.one_line()
    assert path.lstat().st_size == before.st_size


@pytest.mark.usefixtures("no_waiting")
def test_a_fifo_among_texts_is_refused(tmp_path: Path) -> None:
    """Of a directory of texts, and of the description beside a trace, every file is looked at before it is read."""
    make("fifo", tmp_path)
    with pytest.raises(BadInput, match=r"it\.txt cannot be read \(it is a pipe"):
        read_slices(tmp_path)
    trace = tmp_path / "trace.npy"
    np.save(trace, np.zeros((1, 1, 1), np.int16))
    os.mkfifo(info_path(trace))
    with pytest.raises(BadInput, match="it is a pipe"):
        read_trace(trace)


@pytest.mark.parametrize(
    ("args", "stdin", "prompt"),
    [
        (["b", "-p", "one\n"], "", "one\n"),
        (["b", "two"], "three", "two"),
        (["b"], "three\n", "three"),
        (["b", "-"], "four\r\n", "four"),
        (["b", "--prompt", "-"], "\nfive\n\n", "\nfive\n"),
        (["b", "-f", "FILE"], "", "in a file"),
        (["b", "-f", "-"], "seven", "seven"),
        (["b", "-p", ""], "", ""),
        (["b"], "long " * 100_000, "long " * 100_000),
    ],
)
def test_prompts_come_from_one_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], stdin: str, prompt: str
) -> None:
    """An argument, --prompt, a file or standard input, without the last line end of the latter two."""
    file = tmp_path / "prompt"
    file.write_text("in a file\n")
    seen = []

    def run_prompt(_path: Path, request: Any, **_: Any) -> None:
        seen.append(request.prompt)
        raise BadInput("enough")

    monkeypatch.setattr("pocketmoe.runtime.run.run_prompt", run_prompt)
    found = CliRunner().invoke(main, ["run", *(str(file) if arg == "FILE" else arg for arg in args)], input=stdin)
    assert "enough" in found.stderr, found.stderr
    assert seen == [prompt]


@pytest.mark.parametrize(
    ("args", "stdin", "code"),
    [
        (["b", "one", "-p", "two"], b"", 2),
        (["b", "-p", "-", "-f", "-"], b"x", 2),
        (["b"], b"", 2),
        (["b"], b"\xff", 3),
        (["b", "-p", "a\udcff"], b"", 3),
    ],
)
def test_prompts_that_cannot_be_are_refused(args: list[str], stdin: bytes, code: int) -> None:
    """Two places, no place, and bytes that are no text."""
    found = CliRunner().invoke(main, ["run", *args], input=stdin)
    assert found.exit_code == code, (found.stderr, found.exception)
    assert "rompt" in found.stderr or "UTF-8" in found.stderr


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["quantize", "B", "-o", "C", "--scheme", "int4"], {"int4", "int4-all"}),
        (["export", "C", "-o", "B", "--scheme", "k"], {"keep"}),
        (["plan", "B", "--device", "laptop-16"], {"laptop-16gb"}),
        (["profile", "B", "--predict", "thi"], {"this"}),
        (["comp"], {"compare"}),
        (["run", "B", "--prefix-cache-s"], {"--prefix-cache-size"}),
        (["run", "some"], {"some"}),
    ],
)
def test_the_shell_completes(words: list[str], found: set[str]) -> None:
    """Schemes, devices, commands, options by name; a bundle as the directory that it is."""
    from click.shell_completion import BashComplete

    items = BashComplete(main, {}, "pocketmoe", "_POCKETMOE_COMPLETE").get_completions(words[:-1], words[-1])
    assert {item.value for item in items} == found
    assert words != ["run", "some"] or items[0].type == "dir"
