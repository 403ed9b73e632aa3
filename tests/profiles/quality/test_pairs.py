"""Pairs of sentences about two groups: gaps and drifts against transformers and sums by hand, and their gates."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketmoe.bundle.reader import Bundle
from pocketmoe.cli import main
from pocketmoe.errors import BadInput
from pocketmoe.profiles.quality.divergence import Estimate, difference
from pocketmoe.profiles.quality.gate import Extent, judge, read_gate
from pocketmoe.profiles.quality.pairs import Pair, PairSet, magnitude, read_pairs, summarize_pairs
from pocketmoe.quantize.apply import quantize_bundle
from tests.profiles.quality.test_gate import exactly, quality, report

SENTENCES = (
    ("a little girl lived in the village", "a little fox lived in the village", "who"),
    ("she wore a red cloak", "he wore a red cloak", "who"),
    ("the quick dog rests", "the lazy dog rests", "dogs"),
)
finite = st.floats(0.1, 80, allow_nan=False)


def written(path: Path) -> Path:
    path.write_text("".join(json.dumps({"a": a, "b": b, "kind": kind}) + "\n" for a, b, kind in SENTENCES))
    return path


def pair_set(n: int) -> PairSet:
    return PairSet(tuple(Pair(f"a{i}", f"b{i}", "odd" if i % 2 else "even") for i in range(n)), "0" * 64)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(finite, finite, finite, finite), min_size=2, max_size=12))
def test_gaps_and_drift_by_hand(rows: list[tuple[float, float, float, float]]) -> None:
    """Means of differences; exchanging the sentences turns every sign; a model against itself does not drift."""
    nll = np.array([value for a, b, _, _ in rows for value in (a, b)])
    truth = np.array([value for _, _, a, b in rows for value in (a, b)])
    found = summarize_pairs(pair_set(len(rows)), nll, truth).overall
    assert found.gap_nats.value == pytest.approx(sum(b - a for a, b, _, _ in rows) / len(rows))
    assert found.reference_gap_nats is not None
    assert found.drift_nats is not None
    assert found.drift_nats.value == pytest.approx(found.gap_nats.value - found.reference_gap_nats.value, abs=1e-9)
    assert found.drift_nats.low is not None
    assert found.drift_nats.high is not None
    assert found.drift_nats.low - 1e-9 <= found.drift_nats.value <= found.drift_nats.high + 1e-9
    swapped = summarize_pairs(pair_set(len(rows)), nll.reshape(-1, 2)[:, ::-1].ravel(), None).overall
    assert swapped.gap_nats.value == pytest.approx(-found.gap_nats.value)
    still = summarize_pairs(pair_set(len(rows)), nll, nll)
    assert still.overall.drift_nats == Estimate(0.0, 0.0, 0.0)
    assert still.overall.flips == Estimate(0.0, 0.0, 0.0)
    assert {kind.kind: kind.pairs for kind in still.kinds} == {"even": (len(rows) + 1) // 2, "odd": len(rows) // 2}


def test_how_far_a_figure_is_from_zero() -> None:
    assert magnitude(Estimate(-2.0, -3.0, -1.0)) == Estimate(2.0, 1.0, 3.0)
    assert magnitude(Estimate(0.5, -1.0, 2.0)) == Estimate(0.5, 0.0, 2.0)
    assert magnitude(Estimate(-1.0, None, None)) == Estimate(1.0, None, None)


def test_a_difference_of_two_slices_has_the_interval_of_its_normal_limit() -> None:
    """Many windows of one token: value and width as the central limit theorem has them, within a tenth."""
    rng = np.random.default_rng(1)
    first, second = rng.normal(2.0, 1.0, 400), rng.normal(1.5, 2.0, 300)
    found = difference((first, np.ones(400)), (second, np.ones(300)))
    assert found.value == pytest.approx(first.mean() - second.mean())
    spread = 1.96 * np.sqrt(first.var() / 400 + second.var() / 300)
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low == pytest.approx(2 * spread, rel=0.1)
    assert difference((first[:1], np.ones(1)), (second, np.ones(300))).low is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1"),
        ('{"a": "x"}', "missing required field"),
        ('{"a": "x", "b": "y", "group": "z"}', "unknown field"),
        ('{"a": "x", "b": "x"}', "the same"),
        ('{"a": "", "b": "x"}', "line 1"),
        ('{"a": "x", "b": "y", "kind": "\\u001b[2J"}', "line 1"),
        ("", "0 pairs"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(line)
    with pytest.raises(BadInput) as caught:
        read_pairs(path)
    assert words in caught.value.one_line()


def log_likelihood(checkpoint: Path, sentence: str) -> float:
    """By transformers, behind the token that ends texts."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = [tokenizer.eos_token_id, *tokenizer(sentence)["input_ids"]]
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(checkpoint)(torch.tensor([ids])).logits[0]
    rows = torch.log_softmax(logits.double(), -1)
    return float(sum(rows[place, token] for place, token in enumerate(ids[1:])))


def test_pairs_are_scored_filed_and_gated(
    tiny_bundle: Callable[[str], Bundle], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """The reference's gap is transformers' own; a gate on the drift fails with exit 5; record and page have all."""
    before = tiny_bundle("olmoe")
    after = quantize_bundle(before.root, tmp_path / "int8", scheme="int8")
    folder, gate = tmp_path / "texts", tmp_path / "gate"
    folder.mkdir()
    for name, words in (("tale", "once upon a time there was a little girl "), ("numbers", "0 1 1 2 3 5 8 13 ")):
        (folder / f"{name}.txt").write_text(words * 12)
    gate.write_text("pair_drift <= 0\nwho: pair_drift <= 9\nworst: pair_flips <= 1\nslice_gap <= 9\nslice_gap < 0\n")
    command = ["eval", str(after.root), "--reference", str(before.root), "--text", str(folder), "--max-tokens", "64"]
    command += ["--free", "0", "--pairs", str(written(tmp_path / "pairs.jsonl")), "--gate", str(gate)]
    done = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "out")])
    assert done.exit_code == 5, done.output
    assert "pairs of sentences" in done.output
    record = json.loads((tmp_path / "out" / "eval.json").read_text())
    verdicts = {verdict["rule"]: verdict["passed"] for verdict in record["verdicts"]}
    assert verdicts == {
        "overall: pair_drift <= 0": False,
        "who: pair_drift <= 9": True,
        "worst: pair_flips <= 1": True,
        "overall: slice_gap <= 9": True,
        "overall: slice_gap < 0": False,
        "worst: mean_kl within 2 times overall": True,
        "worst: pair_drift <= 0.25": True,
    }
    pairs = record["report"]["pairs"]
    checkpoint = tiny_checkpoint("olmoe")
    truth = [log_likelihood(checkpoint, a) - log_likelihood(checkpoint, b) for a, b, _ in SENTENCES]
    assert pairs["overall"]["reference_gap_nats"]["value"] == pytest.approx(np.mean(truth), abs=1e-3)
    assert pairs["kinds"][0]["reference_gap_nats"]["value"] == pytest.approx(np.mean(truth[:2]), abs=1e-3)
    assert pairs["overall"]["drift_nats"]["value"] != 0
    assert record["report"]["slice_gap"]["gap"]["value"] > 0
    page = (tmp_path / "out" / "eval.html").read_text()
    assert "<h2>Groups</h2>" in page
    assert pairs["sha256"] in page
    assert record["report"]["slice_gap"]["worst"] in page
    assert "wore a red cloak" not in page + json.dumps(record), "the record holds none of the texts"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pair_drift <= 0.1", "needs pairs"),
        ("slice_gap <= 0.1", "two slices"),
        ("one: slice_gap <= 1", "one figure"),
    ],
)
def test_gates_on_what_will_not_be_measured_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "gate").write_text(text)
    with pytest.raises(BadInput, match=words):
        read_gate(tmp_path / "gate", Extent(["one"], False, True, 0))


def test_only_a_drift_that_is_surely_too_large_breaks_the_built_in_gate() -> None:
    """A quarter of a nat in every pair does, the same on average with both signs does not."""
    nll = np.array([30.0, 31.0] * 20)
    noise = np.array([0.0, 4.0, 0.0, 0.0, 4.0, 0.0, 0.0, 0.0] * 5)
    for moved, passed in (([0.0, 0.3] * 20, False), ([0.0, 0.2] * 20, True), (noise, True)):
        pairs = summarize_pairs(pair_set(20), nll + np.array(moved), nll)
        verdicts = judge(replace(report(one=quality(exactly(0.01)), overall=quality(exactly(0.01))), pairs=pairs))
        assert [verdict.passed for verdict in verdicts if verdict.metric == "pair_drift"] == [passed]
