"""What is tried on a processor, and how it is judged: by what this machine itself answers.

Most of it runs in one process there (`guest.py`). Signals, pipes and the server take a process each.
"""

from __future__ import annotations

import json
import signal
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.emulated.bundles import FLOAT, REFERENCE, SCHEMES
from scripts.emulated.machines import Machine

HANG_S = 3600
PROMPT = "The quick brown fox jumps over the lazy dog. Once upon a time there was"
TOKENS = 12
_MANY_TOKENS = 400
ANSWERS = (*((name, way) for name in (FLOAT, *SCHEMES) for way in ("slots", "sessions")), (REFERENCE, "slots"))
FLOATS, QUANTIZED = 1e-4, 0.2  # how far log probabilities of the tiny random model may be apart
Calls = dict[str, dict[str, Any]]  # code, out and err of each call in the guest


class Failed(Exception):
    """What was not as it should be, in a line."""


@dataclass(frozen=True)
class Answer:
    """What `run` gave: tokens, the log probability of each, and the likeliest tokens there with theirs."""

    tokens: list[int]
    logprobs: list[float]
    likeliest: list[list[tuple[int, float]]]


def calls_on(machine: Machine, bundles: dict[str, Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every call of the guest there, as it ends. Raises Failed where the guest ends before its last one."""
    work = {
        "bundles": {name: str(path) for name, path in bundles.items()}, "answers": ANSWERS,
        "prompt": PROMPT, "tokens": TOKENS,
    }  # fmt: skip
    guest = machine.start(["scripts.emulated.guest", json.dumps(work)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert guest.stdout
    assert guest.stderr
    for line in guest.stdout:
        found = json.loads(line)
        yield found["case"], found
    said = guest.stderr.read()
    if guest.wait(HANG_S):
        raise Failed(f"ended with {guest.returncode}: {_last(said)}")


def answer_of(call: dict[str, Any], backend: str) -> Answer:
    """What a call of `run` answered. Raises Failed."""
    if call["code"]:
        raise Failed(f"exit code {call['code']}: {_last(call['err'])}")
    report = json.loads(call["out"])
    if report["backend"] != backend:
        raise Failed(f"ran as {report['backend']}: {report['backend_reason']}")
    likeliest = [[(int(token), float(value)) for token, value in each["top"]] for each in report["logprobs"]]
    return Answer(report["tokens"], [each["logprob"] for each in report["logprobs"]], likeliest)


def compared(found: Answer, expected: Answer, bound: float) -> str:
    """How an answer differs from this machine's, in words.

    Log probabilities may differ by `bound` at most. A token may differ only where both are among the likeliest on both
    machines; what follows then is another text. Raises Failed.
    """
    same = [a == b for a, b in zip(found.tokens, expected.tokens, strict=True)]
    until = same.index(False) if False in same else len(same)
    apart = max((abs(a - b) for a, b in zip(found.logprobs[:until], expected.logprobs[:until], strict=True)), default=0)
    here, there = (dict(answer.likeliest[until]) if until < len(same) else {} for answer in (found, expected))
    apart = max([apart, *(abs(here[token] - there[token]) for token in {*here} & {*there})])
    if apart > bound:
        raise Failed(f"log probabilities are {apart:.0e} apart")
    if until == len(same):
        return "the same bits" if apart == 0 else f"the same tokens, log probabilities within {apart:.0e}"
    one, other = found.tokens[until], expected.tokens[until]
    if other not in here or one not in there:
        raise Failed(f"token {until} is {one} and not {other}, which is none of the likeliest")
    gap = there[other] - there[one]
    return f"log probabilities within {apart:.0e}; token {until} and the next likeliest, {gap:.0e} apart, change places"


def judged(name: str, calls: Calls, expected: Calls) -> str:
    """What the calls in the guest came to for that case. Raises Failed."""
    if name == "doctor":
        return _doctor(calls["doctor"])
    if name == "exit codes":
        return _exit_codes(calls)
    if name == "int4: packed in place":
        _expect(calls, pack=0, undo=0, verify=0)
        found = compared(answer_of(calls["packed"], "slots"), answer_of(expected["int4: slots"], "slots"), QUANTIZED)
        return f"{found}; taken back, it verifies"
    backend = name.rpartition(": ")[2]
    bound = FLOATS if name.startswith(FLOAT) else QUANTIZED
    return compared(answer_of(calls[name], backend), answer_of(expected[name], backend), bound)


IN_THE_GUEST = (*(f"{name}: {backend}" for name, backend in ANSWERS), "int4: packed in place", "exit codes", "doctor")


def interrupted(machine: Machine, bundle: Path) -> str:
    """Ctrl-C while an answer comes ends it with 130 and a word. Raises Failed."""
    options = ("--raw", "--max-tokens", str(_MANY_TOKENS), "--jsonl")
    process = machine.start(
        ["pocketmoe", "run", str(bundle), "-p", PROMPT, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=HANG_S)
    if process.returncode != 130 or "Interrupted" not in err:
        raise Failed(f"exit code {process.returncode}: {_last(err)}")
    return "130, in the middle of an answer"


def chat(machine: Machine, bundle: Path) -> str:
    """Two turns through a pipe are answered. Raises Failed."""
    options = ("--max-tokens", "4", "--temperature", "0", "--context", "128")
    process = machine.start(
        ["pocketmoe", "chat", str(bundle), *options],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, err = process.communicate("hello\nand then?\n", timeout=HANG_S)
    if process.returncode or not out.strip() or err.count("t/s") != 2:
        raise Failed(f"exit code {process.returncode}: {_last(err)}")
    return "two turns answered"


def serve(machine: Machine, bundle: Path) -> str:
    """The server starts, answers a request, and ends when it is told to. Raises Failed."""
    process = machine.start(
        ["pocketmoe", "serve", str(bundle), "--port", "0", "--context", "128"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        asked = {"model": bundle.name, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
        request = urllib.request.Request(
            f"{_address(process)}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=HANG_S) as response:
            answered: dict[str, Any] = json.load(response)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=HANG_S)
    finally:
        process.kill()
    if answered["usage"]["completion_tokens"] != TOKENS:
        raise Failed(f"answered {answered}")
    if process.returncode not in (0, 128 + signal.SIGTERM):
        raise Failed(f"ended with {process.returncode}: {_last(err)}")
    return f"answered {TOKENS} tokens, and ended when told to"


ALONE: dict[str, Callable[[Machine, Path], str]] = {"Ctrl-C": interrupted, "chat through a pipe": chat, "serve": serve}


def _doctor(call: dict[str, Any]) -> str:
    if call["code"]:
        raise Failed(f"exit code {call['code']}: {_last(call['err'])}")
    report = json.loads(call["out"])
    if not report["slots_work"]:
        raise Failed(f"slots do not work: {report['slots_problem']}")
    return f"slots work; sees {', '.join(report['cpu']['features']) or 'no feature'}"


def _exit_codes(calls: Calls) -> str:
    _expect(calls, usage=2, missing=3, damaged=3, budget=4)
    return "2, 3, 3 and 4, each with its line"


def _expect(calls: Calls, **wanted: int) -> None:
    for name, code in wanted.items():
        if calls[name]["code"] != code or "Traceback" in calls[name]["err"]:
            raise Failed(f"{name} ended with {calls[name]['code']}, not {code}: {_last(calls[name]['err'])}")


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stderr
    said: list[str] = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("{") and json.loads(line).get("event") == "ready":
            return json.loads(line)["url"]
    raise Failed(f"the server did not start: {_last(''.join(said))}")


def _last(err: str) -> str:
    """The last line that says something; qemu's own words about features that it lacks say nothing."""
    lines = [line for line in err.splitlines() if line.strip() and "TCG doesn't support" not in line]
    return lines[-1][:300] if lines else "nothing was said"
