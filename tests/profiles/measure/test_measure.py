"""`pocketmoe profile` on a tiny bundle: every budget in a process of its own, resumed after a kill."""

# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import BadInput, BudgetTooSmall, PocketMoEError
from pocketmoe.profiles.machine import doctor
from pocketmoe.profiles.machine.limit import Limited, LimitUnavailable
from pocketmoe.profiles.measure import measure
from pocketmoe.profiles.measure.measure import ProfileRequest, budget_bytes, profile_bundle
from pocketmoe.profiles.profile import PROFILE, REPORT, Profile, read_profile
from pocketmoe.profiles.report.page import render
from tests.hang import HANG_S
from tests.profiles import made_up

LENGTHS = ("--prompt-tokens", "6", "--output-tokens", "8", "--repeats", "0")


@pytest.fixture(autouse=True)
def computing_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes 5 s each time, and has tests of its own; the profile says why it has none."""

    def refuse(*_: object) -> Any:
        raise ValueError("not in this test")

    monkeypatch.setattr(doctor, "measure_computing", refuse)


def cli(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "pocketmoe.cli", "profile", *map(str, arguments)]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(cli(*arguments), capture_output=True, text=True, timeout=HANG_S, check=False)


def wait_for_a_run(path: Path, process: subprocess.Popen[bytes]) -> Profile:
    deadline = time.monotonic() + HANG_S
    while not path.exists():
        assert process.poll() is None, "it ended before anything was measured"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return read_profile(path)


def test_a_killed_profile_goes_on_and_says_what_was_measured(
    tiny_bundle: Callable[[str], Bundle], tmp_path: Path
) -> None:
    """The budget measured before the kill is kept as it is; each run stayed within its limit, with the same answer."""
    root, folder = tiny_bundle("olmoe").root, tmp_path / "profile"
    options = (root, "-o", folder, *LENGTHS, "--prefetch", "off", "--memory", "100%,least", "--slow-disk", "20MB")
    process = subprocess.Popen(cli(*options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before = wait_for_a_run(folder / PROFILE, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(before.runs) < 3

    ended = run(*options, "--json")
    assert ended.returncode == 0, ended.stderr
    profile = msgspec.json.decode(ended.stdout, type=Profile)
    assert profile == read_profile(folder)
    assert before.runs[0] in profile.runs
    assert before.machine == profile.machine
    assert [(r.memory, r.read_bytes_per_s) for r in profile.runs] == [
        ("least", None),
        ("100%", None),
        ("least", 20e6),
    ]
    assert len({r.tokens_sha256 for r in profile.runs}) == 1
    for r in profile.runs:
        assert r.peak_memory_bytes <= r.memory_budget_bytes
        assert r.limited_by == "process" or (r.cgroup_peak_bytes or 0) <= (r.limit_bytes or 0)
        assert sum((r.step.segments, r.step.experts, r.step.waiting, r.step.python)) == pytest.approx(1)
    assert profile.runs[1].misses_per_token <= profile.runs[0].misses_per_token
    assert sum(map(sum, (profile.routing.counts if profile.routing else ()))) == (6 + 8 - 1) * 4 * 2
    report = (folder / REPORT).read_text()
    assert "Predicted against measured" in report

    predicted = run(folder, "--predict", "pi5-8gb", "--json")
    assert predicted.returncode == 0, predicted.stderr
    found = json.loads(predicted.stdout)
    assert len(found["checked"]) == 3
    assert found["predictions"][0]["budgets"]

    other = run(root, "-o", folder, "--prompt-tokens", "7", "--output-tokens", "8")
    assert other.returncode == 3
    assert "another bundle, workload or setting" in other.stderr
    assert read_profile(folder) == profile


def test_the_replayed_curve_is_what_was_measured(tiny_bundle: Callable[[str], Bundle], tmp_path: Path) -> None:
    """Without prefetch a run has the hits that replaying the routing at its slots says, and reads as much."""
    text = tmp_path / "a text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. A mixture of experts routes each token.")
    request = ProfileRequest(
        tiny_bundle("olmoe").root, ("40%",), prompt_tokens=6, output_tokens=24, repeats=0, text=text, prefetch="off"
    )
    profile = profile_bundle(request, tmp_path / "p")
    assert (profile.workload.source, profile.workload.text) == ("text", "a text.txt")
    (measured,) = profile.runs
    assert profile.routing is not None
    (point,) = [p for p in profile.routing.curve if p.expert_slots == measured.expert_slots]
    assert point.hit_rate == pytest.approx(measured.hit_rate)
    assert point.prompt_reads == measured.prompt_reads
    assert measured.bytes_read_per_token == pytest.approx(measured.misses_per_token * profile.model.expert_read_bytes)
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".npy"], "no trace of the text is left"


def test_without_a_cgroup_a_run_is_measured_and_that_is_said(
    tiny_bundle: Callable[[str], Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise LimitUnavailable("no memory cgroup can be made here (Permission denied)")

    monkeypatch.setattr(measure, "run_limited", refuse)
    request = ProfileRequest(tiny_bundle("olmoe").root, ("100%",), prompt_tokens=3, output_tokens=3, repeats=0)
    profile = profile_bundle(request, tmp_path / "p")
    (measured,) = profile.runs
    assert (measured.limited_by, measured.limit_bytes, measured.cgroup_peak_bytes) == ("process", None, None)
    assert "Permission denied" in measured.limit_problem
    assert "No real memory limit" in render(profile)


def test_a_budget_beside_other_work_is_measured_again(
    tiny_bundle: Callable[[str], Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quieter of the two is kept, marked, and said with its result as it comes."""
    shares = iter([0.9, 0.4])
    real = measure.run_plain
    said: list[str] = []

    def loaded(command: Sequence[str], *rest: Any) -> Limited:
        ended = real(command, *rest)
        if '"run"' not in ended.stdout[:10]:
            return ended
        answer, share = json.loads(ended.stdout), next(shares)
        answer["run"] |= {"others_cpu": share, "throttled": 0, "others_disk_bytes_per_s": None, "loaded": share > 0.05}
        return replace(ended, stdout=json.dumps(answer))

    def refuse(*_: object) -> None:
        raise LimitUnavailable("none here")

    monkeypatch.setattr(measure, "run_limited", refuse)
    monkeypatch.setattr(measure, "run_plain", loaded)
    request = ProfileRequest(tiny_bundle("olmoe").root, ("least",), prompt_tokens=3, output_tokens=3)
    profile = profile_bundle(request, tmp_path / "p", lambda what, _, total: None if total else said.append(what))
    assert [(r.others_cpu, r.loaded, r.tries) for r in profile.runs] == [(0.4, True, 2)]
    results = [line for line in said if "tokens/s" in line]
    assert [line.split(":")[0] for line in results] == ["1 of 1, least"]
    assert "others took 40% of the processors" in results[0]
    assert sum("measuring it again" in line for line in said) == 1


def test_what_cannot_be_measured_is_refused_before_anything_is_written(
    tiny_bundle: Callable[[str], Bundle], tmp_path: Path
) -> None:
    """No bundle, a text too short, more than the context; each with its exit code, and no profile left behind."""
    root = tiny_bundle("olmoe").root
    with pytest.raises(BadInput):
        profile_bundle(ProfileRequest(tmp_path), tmp_path / "p")
    short = tmp_path / "short.txt"
    short.write_text("Hi")
    for request, why in (
        (ProfileRequest(root, text=short), "the prompt is to have 128"),
        (ProfileRequest(root, prompt_tokens=300), "context of 256"),
    ):
        with pytest.raises(PocketMoEError, match=why) as refused:
            profile_bundle(request, tmp_path / "p")
        assert refused.value.exit_code == 3
    with pytest.raises(BudgetTooSmall):
        profile_bundle(ProfileRequest(root, ("1MB",), prompt_tokens=3, output_tokens=3, repeats=0), tmp_path / "p")
    assert not (tmp_path / "p" / PROFILE).exists()
    assert run(root, *LENGTHS).returncode == 2
    assert run(root, "-o", tmp_path / "q", "--memory", "much").returncode == 2


def test_what_a_budget_comes_to() -> None:
    """A share pays for its slots on top of the fixed part, and never less than the least."""
    profile = made_up.profile()
    assert budget_bytes(profile, "least") == 104_000_000
    assert budget_bytes(profile, "50%") == 100_000_000 + 8 * 2_000_000
    assert budget_bytes(profile, "1%") == 104_000_000
    assert budget_bytes(profile, "1GB") == 10**9
    with pytest.raises(BudgetTooSmall):
        budget_bytes(profile, "50MB")
