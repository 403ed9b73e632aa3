"""The same weights at accuracy level 0, against a bundle that was quantized for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from pocketmoe.bundle.reader import Bundle
from pocketmoe.profiles.quality.gate import judge
from pocketmoe.profiles.quality.levels import compare_levels, write_at_level
from pocketmoe.profiles.quality.quality import Slice, evaluate
from pocketmoe.profiles.quality.report import LevelComparison, levels_of
from pocketmoe.quantize.apply import quantize_bundle
from pocketmoe.quantize.schemes import find_scheme
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.options import EngineOptions

TEXT = [Slice("text", "Call it a table of contents, or an index of what was said. " * 20)]


def logits(bundle: Bundle) -> np.ndarray:
    with Engine(bundle, EngineOptions(capacity=32, backend="sessions")) as engine:
        return engine.feed([*range(5, 25)], rows="all")


def test_levels_of_one_bundle(tiny_bundle: Callable[[str], Bundle], tmp_path: Path) -> None:
    """Level 0 is bit for bit what quantizing for it gives; levels differ a little; a gate stands on how much."""
    source = tiny_bundle("olmoe")
    own = quantize_bundle(source.root, tmp_path / "own", scheme="int4")
    made = quantize_bundle(source.root, tmp_path / "made", scheme=replace(find_scheme("int4"), accuracy_level=0))
    exact = write_at_level(own, tmp_path / "exact", 0)
    assert (levels_of(own), levels_of(exact)) == ((4,), (0,))
    np.testing.assert_array_equal(logits(exact), logits(made))
    assert (logits(exact) != logits(own)).any()
    assert list(exact.verify()) == []

    found = compare_levels(own, TEXT, scratch=tmp_path)
    assert found is not None
    assert 0 < found.tokens <= 64
    assert 0 < found.mean_kl_nats < 0.05
    assert compare_levels(source, TEXT, scratch=tmp_path) is None, "nothing is rounded in float32"

    report = evaluate(own, TEXT, reference=source, max_tokens=64)
    passed = {v.metric: v.passed for v in judge(replace(report, levels=found))}
    broken = {v.metric: v.passed for v in judge(replace(report, levels=LevelComparison(64, 0.1, 2.0)))}
    assert (passed["level_kl"], broken["level_kl"]) == (True, False)
