"""Budgets at random, each under a memory cgroup of exactly that size: the promise of `--memory`, as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pocketmoe.bundle.reader import Bundle
from tests.cgroup import run_limited

ROOT = Path(__file__).parent.parent


@pytest.mark.root
@pytest.mark.slow
def test_random_budgets_are_kept_and_change_no_token(reference_bundle: Callable[[str], Bundle], tmp_path: Path) -> None:
    """20 budgets between the least and everything, caches cold: none killed, none exceeded, the same tokens at each."""
    run_limited(["true"], 64 * 10**6)  # skips where there are no cgroups
    bundle = reference_bundle("int4")
    script = [sys.executable, str(ROOT / "benchmarks" / "budgets.py"), str(bundle.root)]
    rows = tmp_path / "rows.json"
    done = subprocess.run([*script, "--json", str(rows)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len({row["budget_bytes"] for row in kept}) == 20
    for row in kept:
        assert 0 < row["counted_peak_bytes"] <= row["budget_bytes"], row
        assert row["peak_bytes"] <= row["budget_bytes"], row
        assert not row["problem"], row
    assert kept[0]["hit_rate"] < kept[-1]["hit_rate"]
