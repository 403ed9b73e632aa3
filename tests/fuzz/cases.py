"""A case as data, and how it is judged."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.place import Place, changes, holds_secret
from tests.fuzz.zygote import CPU_S, Ending, Order, Zygote

MIB = 1 << 20
SLACK_BYTES = 48 * MIB  # of resident memory above a budget: pages that slots map twice, allocators
LIGHT_BYTES, HEAVY_BYTES = 1024 * MIB, 3072 * MIB  # for a command without a budget: reading; with torch
_FINE = frozenset({0, 2, 3, 4, 5})
_FRAME = re.compile(r'File "([^"]+)", line \d+, in (\S+)')
_LONG = 2000  # characters of an error's line beside what the user typed
_TIE = 1e-4  # of two logits: which is the larger is anyone's guess


def command(*arguments: object, heavy: bool = False, memory_bytes: int = 0, cpu_s: float | None = None) -> Order:
    """An order to run the command line. `memory_bytes`: resident, at most; 0: what is stated for its kind."""
    limit = memory_bytes or (HEAVY_BYTES if heavy else LIGHT_BYTES)
    task = "tests.fuzz.tasks:command"
    cpu_s = cpu_s or (3 * CPU_S if heavy else CPU_S)
    return Order(task, tuple(map(str, arguments)), limit, cpu_s=cpu_s, heavy=heavy)


@dataclass(frozen=True)
class Step:
    """A command of a case, the exit codes that are right, and what it may write (relative to cwd)."""

    order: Order
    codes: frozenset[int] = _FINE
    writes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compare:
    """The last step's `run --json` answers must be transformers' for this checkpoint, in the order of `prompts`."""

    checkpoint: str
    prompts: tuple[dict[str, object], ...]
    tokens: int


@dataclass(frozen=True)
class Case:
    """What was changed, and what is done with it. Steps after one that does not exit 0 are left out."""

    kind: str
    what: str
    steps: tuple[Step, ...]
    all_steps: bool = False  # go on after a refusal
    agree: bool = False  # the first step (`verify`) must refuse whatever the second (`run`) does
    compare: Compare | None = None


@dataclass
class Outcome:
    """What came of a case: how its steps ended, and the faults found."""

    kind: str
    what: str
    codes: list[str] = field(default_factory=list[str])
    said: list[str] = field(default_factory=list[str])
    faults: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])  # (group, detail)
    seconds: float = 0.0
    cpu_s: float = 0.0


def perform(case: Case, place: Place, zygotes: dict[bool, Zygote]) -> Outcome:
    """Run the steps of a case and judge them."""
    outcome = Outcome(case.kind, case.what)
    outputs = []
    for n, step in enumerate(case.steps):
        before = place.snapshot()
        output = place.root.with_name(f"{place.root.name}-{n}")
        ending = zygotes[step.order.heavy].run(step.order, place.cwd, output, place.environment())
        stdout, stderr = (_text(output.with_name(f"{output.name}.{end}")) for end in ("out", "err"))
        outcome.seconds += ending.seconds
        outcome.cpu_s += ending.cpu_s
        outcome.codes.append(ending.killed_for or str(ending.code))
        outcome.said.append(last_line(stderr)[:300])
        outcome.faults += _judge(step, ending, stderr)
        outcome.faults += [(f"files: {_kind(c)}", c) for c in changes(before, place.snapshot(), step.writes)]
        outcome.faults += [("left in /dev/shm", name) for name in ending.left_in_memory]
        for written in step.writes:
            outcome.faults += [("secret copied", name) for name in holds_secret(place.cwd / written)]
        if ending.code != 0 and not case.all_steps:
            return outcome
        outputs.append((step, ending, stdout))
    if case.compare:
        _compare(
            case.compare, [out for step, _, out in outputs if step.order.arguments[0] == "run"], place, zygotes, outcome
        )
    if case.agree and outcome.codes[:1] == ["0"] and outcome.codes[1:] == ["3"]:
        outcome.faults.append(("verify accepts what run refuses", outcome.said[-1]))
    return outcome


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace") if path.exists() else ""


def _kind(change: str) -> str:
    verb, _, name = change.partition(" ")
    return f"{verb} {name.split('/')[0]}"


def last_line(stderr: str) -> str:
    """The last line with text; a progress bar ends in a carriage return."""
    return next((line.strip() for line in reversed(re.split(r"[\r\n]", stderr)) if line.strip()), "")


def _judge(step: Step, ending: Ending, stderr: str) -> list[tuple[str, str]]:
    """The faults of one command that ended so."""
    line = last_line(stderr)
    if ending.killed_for:
        return [(f"{ending.killed_for}: {where(stderr)}", f"{ending.seconds:.0f} s, {ending.peak_bytes / MIB:.0f} MiB")]
    faults = [("left running", " ".join(ending.left_running))] if ending.left_running else []
    if "Traceback (most recent call last)" in stderr:
        return [*faults, (f"traceback: {where(stderr)}", line)]
    if ending.code < 0:
        return [*faults, (f"signal {-ending.code}", line)]
    if ending.code not in _FINE:
        place = re.search(r"bug: (\w+)(?: in ([\w.]+):\d+)?", line)
        return [*faults, (f"exit {ending.code}{f': {place[1]} in {place[2]}' if place else ''}", line)]
    if ending.code not in step.codes:
        return [*faults, (f"exit {ending.code}, not {sorted(step.codes)}", line)]
    if ending.code and not line.startswith(("Error: ", '{"error": "')):  # --json
        faults.append((f"exit {ending.code} without a line", line))
    typed = max((len(str(argument)) for argument in step.order.arguments), default=0)
    if ending.code and len(line) > typed + _LONG:
        faults.append((f"a line of over {_LONG} characters", line[:200]))
    return faults


def where(stderr: str) -> str:
    """The innermost frame of ours in a traceback, and the error's name: what faults are grouped by."""
    frames = [(path, name) for path, name in _FRAME.findall(stderr) if "/pocketmoe/" in path]
    path, name = frames[-1] if frames else ("?", "?")
    error = next(
        (
            text
            for text in reversed(stderr.splitlines())
            if re.match(r"[\w.]+(Error|Exception|Warning|Exit|\w*Fault)?\b", text)
        ),
        "",
    )
    return f"{path.rpartition('/pocketmoe/')[2]}:{name} {error.partition(':')[0][:60]}"


def _compare(
    compare: Compare, answers: Sequence[str], place: Place, zygotes: dict[bool, Zygote], outcome: Outcome
) -> None:
    """Tokens against transformers', computed in a child of its own."""
    target = place.root / "truth.json"
    task = "tests.fuzz.tasks:transformers_answer"
    order = Order(
        task, (compare.checkpoint, list(compare.prompts), compare.tokens, str(target)), HEAVY_BYTES, heavy=True
    )
    output = place.root.with_name(f"{place.root.name}-truth")
    ending = zygotes[True].run(order, place.cwd, output, place.environment())
    outcome.seconds += ending.seconds
    outcome.cpu_s += ending.cpu_s
    if ending.code != 0 or ending.killed_for:
        outcome.codes.append("transformers refuses")
        outcome.said.append(last_line(_text(output.with_name(f"{output.name}.err")))[:300])
        return
    outcome.codes.append("compared")
    for prompt, found, truth in zip(compare.prompts, answers, json.loads(target.read_text()), strict=True):
        answer = json.loads(found)
        if answer["prompt_tokens"] != len(truth["prompt"]):
            detail = (
                f"{prompt}: {answer['prompt_tokens']} tokens in the prompt, transformers has {len(truth['prompt'])}"
            )
            outcome.faults.append(("tokens: the prompt differs", detail))
        elif not same_tokens(answer["tokens"], truth["tokens"], truth["margins"]):
            detail = f"{prompt}: {answer['tokens']}, transformers has {truth['tokens']}"
            outcome.faults.append(("tokens: the answer differs", detail))


def same_tokens(ours: list[int], theirs: list[int], margins: list[float]) -> bool:
    """Whether two greedy answers are the same, up to a step where two logits are as good as equal."""
    for n in range(max(len(ours), len(theirs))):
        if ours[n : n + 1] != theirs[n : n + 1]:
            return n < len(margins) and not margins[n] > _TIE  # NaN too: nothing is the largest then
    return True


def discard(place: Place) -> None:
    """Remove a case's files."""
    shutil.rmtree(place.root, ignore_errors=True)
    for path in place.root.parent.glob(f"{place.root.name}-*"):
        path.unlink(missing_ok=True)
