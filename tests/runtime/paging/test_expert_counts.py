"""What counts of uses say, against counts made by hand."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import numpy as np
import pytest

from pocketmoe.bundle.manifest import FileEntry
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import ExpertId
from pocketmoe.calibration import SUMMARY, CalibrationSummary, LayerSummary
from pocketmoe.errors import DamagedFile
from pocketmoe.runtime.paging.expert_counts import ExpertCounts, calibrated_counts, shares, summarize, to_load_first
from tests.bundles import reseal, write_bundle


def test_even_and_uneven_routing_are_told_apart() -> None:
    """Even use has entropy 1 and a quarter of the uses in a quarter of the experts; one expert alone 0 and all."""
    even = summarize(np.full((2, 8), 5), [8, 8])
    assert even is not None
    assert even.entropy == pytest.approx(1)
    assert even.hottest_quarter == pytest.approx(0.25)
    alone = summarize(np.array([[0, 9, 0, 0]]), [4])
    assert alone is not None
    assert alone.entropy == pytest.approx(0)
    assert alone.hottest_quarter == 1
    mixed = summarize(np.array([[6, 2, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]), [4, 6])
    assert mixed is not None
    assert mixed.entropy == pytest.approx(-(0.6 * np.log(0.6) + 0.2 * np.log(0.2) + 0.2 * np.log(0.1)) / np.log(4))
    assert mixed.hottest_quarter == pytest.approx(0.6)
    assert summarize(np.zeros((2, 4), int), [4, 4]) is None


def test_half_of_the_slots_go_to_what_most_tokens_chose() -> None:
    """Layers compete by the share of their tokens; likeliest first; none never chosen, none of another pool."""
    uses = np.array([[30, 0, 10, 0], [10, 14, 8, 8]])  # 40 tokens choose one expert, 20 tokens two
    share = shares(uses, [1, 2])
    assert np.allclose(share, [[0.75, 0, 0.25, 0], [0.5, 0.7, 0.4, 0.4]])
    everyone = [ExpertId(layer, expert) for layer in range(2) for expert in range(4)]
    assert to_load_first(share, everyone, 6) == [(0, 0), (1, 1), (1, 0)]
    assert to_load_first(share, everyone, 11) == [(0, 0), (1, 1), (1, 0), (1, 2), (1, 3)]
    assert len(to_load_first(share, everyone, 16)) == 6
    assert to_load_first(share, everyone[::2], 4) == [(0, 0), (1, 0)]
    assert not shares(np.zeros((1, 3), int), [2]).any()


def test_counts_fade_and_anything_else_in_their_file_is_as_good_as_none(tmp_path: Path) -> None:
    """What 4096 tokens used before counts half; a file of another size, NaN, negative or foreign counts is ignored."""
    counts = ExpertCounts(tmp_path, [3, 2])
    assert counts.read() is None
    counts.add(np.array([[8, 0, 2], [5, 5, 0]]), top_k=2)
    counts.add(np.array([[0, 8192, 0], [8192, 0, 0]]), top_k=2)
    found = counts.read()
    assert found is not None
    np.testing.assert_allclose(found, [[4, 8192, 1], [8194.5, 2.5, 0]])
    (file,) = tmp_path.iterdir()
    good = np.fromfile(file)
    for bad in (good[:-1], np.append(good, 1.0), np.append(good[:-1], 7.0), -good, good * np.nan):
        bad.tofile(file)
        assert counts.read() is None
    ExpertCounts(tmp_path / "missing", [3]).add(np.zeros((1, 3), np.int64), top_k=1)


def test_what_calibration_counted_is_loaded_first(tmp_path: Path) -> None:
    """A bundle that was calibrated and never run: its summary says what is hot; another model's is refused."""
    bundle = write_bundle(tmp_path / "bundle")
    assert calibrated_counts(bundle) is None
    experts = [layer.n_experts for layer in bundle.manifest.moe_layers]

    def calibrated(counts: list[list[int]]) -> Bundle:
        layers = tuple(LayerSummary(tokens=row, weight=[0.0] * len(row), factor=1.0) for row in counts)
        summary = CalibrationSummary(tokens=9, slices=("a",), text_sha256="0" * 64, layers=layers)
        data = msgspec.json.encode(summary)
        (bundle.root / SUMMARY).write_bytes(data)
        entry = FileEntry(nbytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        reseal(bundle.root, files={**bundle.manifest.files, SUMMARY: entry})
        return Bundle.open(bundle.root)

    counts = [[place + 1 for place in range(count)] for count in experts]
    uses = calibrated_counts(calibrated(counts))
    assert uses is not None
    assert [row[:count].tolist() for row, count in zip(uses, experts, strict=True)] == counts
    for wrong in (counts[:-1], [[*counts[0], 1], *counts[1:]], [[-1, *counts[0][1:]], *counts[1:]]):
        with pytest.raises(DamagedFile, match="does not count this model's experts"):
            calibrated_counts(calibrated(wrong))
