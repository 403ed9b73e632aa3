"""The replay tool against the engine itself: what it says of a recorded run is what that run did."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import BadInput, BudgetTooSmall
from pocketmoe.profiles.routing.policies import POLICIES, PRODUCT
from pocketmoe.profiles.routing.replay import BudgetResult, ReplayReport, replay
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.trace import Trace, TraceWriter, describe, read_trace
from tests.bundles import write_bundle
from tests.hang import HANG_S

ANSWER = 60


def budgets(*texts: str) -> list[tuple[str, MemoryRequest]]:
    return [(text, MemoryRequest.parse(text)) for text in texts]


def only(report: ReplayReport) -> BudgetResult:
    (budget,) = report.budgets
    return budget


@pytest.mark.parametrize("memory", ["100%", "60%", "38%", "20%"])
def test_a_replay_says_what_the_run_did(tiny_bundle: Callable[[str], Bundle], tmp_path: Path, memory: str) -> None:
    """At the run's own slots the product's policy has exactly the run's hits, and reads its bytes.

    Down to 6 slots for 4 layers of 2 experts a token. What a share comes to in bytes, comes to its slots again.
    """
    path = tmp_path / "t.npy"
    bundle = tiny_bundle("olmoe")
    layers = bundle.manifest.moe_layers
    with Engine(bundle, EngineOptions(MemoryRequest.parse(memory), 100, 2, prefetch="off")) as engine:
        with TraceWriter(path, layers, 3) as writer:
            engine.on_routes = writer
            logits = engine.feed([5, 6, 7])
            before = dataclasses.replace(engine.stats)
            for _ in range(ANSWER):
                logits = engine.feed([int(np.argmax(logits[-1] + np.sin(np.arange(logits.shape[1]) * engine.length)))])
            writer.publish(describe(engine))
        hits, misses = engine.stats.hits - before.hits, engine.stats.misses - before.misses
        read = engine.stats.bytes_read - before.bytes_read
        slots, total = sum(engine.opened.slots.values()), engine.budget.total_bytes
    assert misses or memory == "100%"
    trace = read_trace(path)
    assert trace.prompt_walks == (3,)
    replayed = only(replay(path, trace, budgets(memory), ["pocketmoe"]))
    assert replayed.slots == slots
    assert replayed.total_bytes is not None
    assert 0.99 * total < replayed.total_bytes <= total, "a share also pays for what only loading takes"
    (ours,) = replayed.policies
    assert ours.hit_rate == hits / (hits + misses)
    assert ours.misses_per_token == misses / ANSWER
    assert ours.bytes_per_token == pytest.approx(read / ANSWER)
    again = only(replay(path, trace, budgets(str(replayed.total_bytes + slots)), ["pocketmoe"]))
    assert again.slots == slots or (again.slots > slots and memory == "20%"), "there loading needs more than the slots"
    with pytest.raises(BudgetTooSmall):
        replay(path, trace, budgets("1MB"), ["pocketmoe"])
    estimate = replay(path, dataclasses.replace(trace, info=None), budgets(memory), ["pocketmoe"], bundle)
    assert only(estimate).policies[0].hit_rate == ours.hit_rate
    assert only(estimate).total_bytes == pytest.approx(total, rel=0.15)


def two_pools(tmp_path: Path) -> tuple[Path, Trace]:
    """A trace in which every other expert is of another size, and costs ten times as much to read."""
    from tests.runtime.test_trace import PoolInfo, record

    path = tmp_path / "t.npy"
    pools = tuple(PoolInfo(read_bytes=r, slot_bytes=s, slots=1) for r, s in ((100, 120), (1000, 1200)))
    record(
        path, [3, *[1] * 30], prompt=3, pools=pools, pool_of=tuple(tuple(e % 2 for e in range(n)) for n in (4, 9, 300))
    )
    return path, read_trace(path)


def test_pools_of_different_sizes_share_a_budget(tmp_path: Path) -> None:
    """Each pool has the same share of its experts, never more than the bytes pay for; misses cost what they read."""
    path, trace = two_pools(tmp_path)
    whole = 1000 + 157 * 120 + 156 * 1200
    full = only(replay(path, trace, [(str(whole), MemoryRequest(total_bytes=whole))]))
    assert full.slots == 313
    assert full.total_bytes == whole
    half = only(replay(path, trace, [("half", MemoryRequest(total_bytes=whole // 2))]))
    assert half.total_bytes is not None
    assert whole // 2 - 2 * 1200 < half.total_bytes <= whole // 2
    prompt, answer = (
        {(layer, int(e)) for token in part for layer, row in enumerate(token) for e in row if e >= 0}
        for part in (trace.ids[:3], trace.ids[3:])
    )
    first_reads = sum(1000 if e % 2 else 100 for _, e in answer - prompt)
    for result in full.policies:
        if result.policy != "pinned":
            assert result.bytes_per_token == pytest.approx(first_reads / 30), result.policy


def test_what_cannot_be_replayed_is_refused(tmp_path: Path) -> None:
    """Another model's bundle, bytes where sizes are unknown, and a trace without an answer."""
    path, trace = two_pools(tmp_path)
    with pytest.raises(BadInput, match="another model"):
        replay(path, trace, budgets("50%"), bundle=write_bundle(tmp_path / "other"))
    with pytest.raises(BadInput, match="1GB means nothing") as refused:
        replay(path, dataclasses.replace(trace, info=None), budgets("1GB"))
    assert "--bundle" in refused.value.one_line()
    with pytest.raises(BadInput, match="after the prompt"):
        replay(path, dataclasses.replace(trace, prompt_walks=(len(trace.ids),)), budgets("50%"))


def test_a_budget_below_one_token_is_named(tmp_path: Path) -> None:
    """Where a walk through the layers wants more than there are slots, and which policies then hit nothing."""
    path = tmp_path / "t.npy"
    np.save(path, np.tile(np.arange(4, dtype=np.int16), (30, 8, 1)))
    scarce, enough = replay(path, read_trace(path), budgets("80%", "100%")).budgets
    assert scarce.below_one_token
    assert scarce.slots == 25
    assert "25 slots hold less than the 32 experts of one token" in scarce.warnings[0]
    assert "lru" in scarce.warnings[0]
    assert "pocketmoe" not in scarce.warnings[0]
    assert not enough.below_one_token
    assert enough.warnings == []


def pocketmoe(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pocketmoe.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG_S)


def test_the_command_records_and_replays(tiny_bundle: Callable[[str], Bundle], tmp_path: Path) -> None:
    """`run --trace` warns what a trace reveals; `replay` prints a table or one object; failures have exit codes."""
    path = tmp_path / "t.npy"
    options = ("--prompt", "hello", "--raw", "--max-tokens", "9", "--memory", "50%", "--json")
    ran = pocketmoe("run", tiny_bundle("olmoe").root, *options, "--trace", path)
    assert ran.returncode == 0, ran.stderr
    assert "91%" in ran.stderr
    run = json.loads(ran.stdout)
    assert 0 < run["routing"]["hottest_quarter"] <= 1
    report = json.loads(pocketmoe("replay", path, "--memory", "25%,50%", "--json").stdout)
    assert report["tokens"] == run["prompt_tokens"] + run["generated_tokens"] - 1
    assert [budget["slots"] for budget in report["budgets"]] == [8, run["expert_slots"]]
    assert [result["policy"] for result in report["budgets"][0]["policies"]] == [PRODUCT]
    every = json.loads(pocketmoe("replay", path, "--memory", "25%", "--all", "--json").stdout)
    assert [result["policy"] for result in every["budgets"][0]["policies"]] == list(POLICIES)
    own = pocketmoe("replay", path, "--memory", "25%,50%")
    assert [line.split()[0] for line in own.stdout.splitlines()[-2:]] == ["25%", "50%"]
    table = pocketmoe("replay", path, "--memory", "25%", "--policy", "lru", "--policy", "belady")
    assert table.returncode == 0, table.stderr
    assert [line.split()[0] for line in table.stdout.splitlines()[-2:]] == ["lru", "belady"]
    cases = [
        (2, ("replay", path, "--policy", "magic"), "magic"),
        (2, ("replay", path, "--memory", "25%,much"), "much"),
        (3, ("replay", tmp_path / "none.npy"), "none.npy"),
        (3, ("replay", path, "--bundle", tmp_path), "not a PocketMoE bundle"),
        (4, ("replay", path, "--memory", "1MB"), "least that would do is"),
        (3, ("run", tiny_bundle("olmoe").root, *options, "--trace", tmp_path / "no" / "t.npy"), "t.npy"),
    ]
    for code, args, words in cases:
        done = pocketmoe(*args)
        assert done.returncode == code, (args, done.stderr)
        assert words in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
