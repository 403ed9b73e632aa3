"""Gates: limits on made-up reports, judged by hand; and what a file may hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import msgspec
import pytest

from pocketmoe.errors import BadInput
from pocketmoe.profiles.quality.divergence import Estimate
from pocketmoe.profiles.quality.free_running import FreeRunning
from pocketmoe.profiles.quality.gate import METRICS, Extent, Verdict, judge, judge_tasks, read_gate
from pocketmoe.profiles.quality.pairs import PairQuality, PairReport
from pocketmoe.profiles.quality.report import Divergence, Quality, QualityReport, Seen, SliceGap, SliceQuality
from pocketmoe.profiles.quality.tasks import TaskFigure, estimates

EXTENT = Extent(["docs", "a: b", "ood"], marked=True, compared=True, prompts=3, kinds=("who",))


def exactly(value: float) -> Estimate:
    return Estimate(value, value, value)


def quality(mean_kl: Estimate, top1: float = 0.96, answers: Mapping[str, Estimate] = MappingProxyType({})) -> Quality:
    divergence = Divergence(
        reference_perplexity=exactly(50),
        perplexity_ratio=exactly(1.004),
        mean_kl_nats=mean_kl,
        p99_kl_nats=exactly(0.2),
        top1_agreement=exactly(top1),
        router_agreement=exactly(0.9),
        router_agreement_by_layer=(0.95, 0.85),
    )
    nothing = exactly(0)
    usual = FreeRunning(
        prompts=4,
        tokens=256,
        same_tokens=exactly(0.7),
        tokens_until_difference=exactly(30),
        mean_kl_nats=exactly(0.01),
        repetition=exactly(0.4),
        excess_repetition=nothing,
        nll_nats=exactly(1.5),
        excess_nll_nats=nothing,
    )
    return Quality(1000, 10, exactly(50.2), exactly(1.9), divergence, msgspec.structs.replace(usual, **answers))


def report(**slices: Quality) -> QualityReport:
    """A report whose overall figures are those of the slice `overall`."""
    overall = slices.pop("overall")
    pieces = tuple(SliceQuality(name, name == "ood", 1, "0" * 64, found) for name, found in slices.items())
    return QualityReport(
        candidate_sha256="c" * 64,
        candidate_bytes=1000,
        candidate_touched_bytes_per_token=100.0,
        candidate_accuracy_levels=(4,),
        reference_sha256="d" * 64,
        reference_bytes=4000,
        reference_touched_bytes_per_token=400.0,
        window_tokens=512,
        overall=overall,
        in_distribution=overall,
        out_of_distribution=slices.get("ood"),
        slices=pieces,
        seen=Seen(1.0, 1.0, 1.0),
    )


@pytest.fixture
def found() -> QualityReport:
    return report(
        docs=quality(exactly(0.01), top1=0.97),
        ood=quality(exactly(0.02), top1=0.94),
        overall=quality(exactly(0.015)),
    )


def with_pairs(made: QualityReport) -> QualityReport:
    """The same with pairs of sentences, and two slices that are apart."""
    half = exactly(0.5)
    pairs = PairQuality("who", 20, exactly(-0.2), half, exactly(-0.25), exactly(0.05), half)
    gap = SliceGap("mean_kl", "ood", "docs", exactly(0.01))
    return replace(made, slice_gap=gap, pairs=PairReport("e" * 64, replace(pairs, kind="overall"), (pairs,)))


def verdict_on(found: QualityReport, tmp_path: Path, text: str) -> Verdict:
    gate = tmp_path / "gate"
    gate.write_text(text)
    verdict, *built_in = judge(found, read_gate(gate, replace(EXTENT, slices=["docs", "ood"])))
    assert [rule.built_in for rule in built_in] == [True] * 4
    return verdict


@pytest.mark.parametrize(
    ("line", "passed", "scope", "value"),
    [
        ("mean_kl <= 0.015", True, "overall", 0.015),
        ("mean_kl < 0.015", False, "overall", 0.015),
        ("overall: top1 >= 0.95  # as in May", True, "overall", 0.96),
        ("worst: mean_kl <= 0.019", False, "ood", 0.02),
        ("worst: top1 >= 0.95", False, "ood", 0.94),
        ("docs: top1>0.96", True, "docs", 0.97),
        ("in_distribution:mean_kl<=1e-3", False, "overall", 0.015),
        ("out_of_distribution: mean_kl <= 0.02", True, "out_of_distribution", 0.02),
        ("router_layer_min >= 0.9", False, "overall", 0.85),
        ("free_same >= 0.5", True, "overall", 0.7),
        ("bytes <= 999", False, "overall", 1000),
        ("touched_bytes <= 100", True, "overall", 100),
    ],
)
def test_a_limit(found: QualityReport, tmp_path: Path, line: str, passed: bool, scope: str, value: float) -> None:
    verdict = verdict_on(found, tmp_path, f"# release\n\n{line}\n")
    assert (verdict.passed, verdict.value, verdict.line) == (passed, value, 3)
    assert verdict.scope == ("in_distribution" if line.startswith("in_") else scope)


def test_every_metric_can_be_told(found: QualityReport, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    gate.write_text("".join(f"{metric} >= 0\n" for metric in METRICS))
    verdicts = judge(with_pairs(found), read_gate(gate, EXTENT))
    assert [verdict.metric for verdict in verdicts[: len(METRICS)]] == list(METRICS)
    assert all(verdict.value is not None and verdict.passed for verdict in verdicts)


def test_what_cannot_be_told_has_not_passed(found: QualityReport, tmp_path: Path) -> None:
    """Experts that do not correspond have no router agreement."""
    divergence = found.overall.divergence
    assert divergence is not None
    unlike = replace(divergence, router_agreement=None, router_agreement_by_layer=())
    found = replace(found, overall=replace(found.overall, divergence=unlike))
    for metric in ("router", "router_layer_min"):
        verdict = verdict_on(found, tmp_path, f"{metric} >= 0")
        assert (verdict.passed, verdict.value) == (False, None)
        assert "not known" in str(verdict)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mean_kl <= 0.1\nmean_kl = 0.1", "line 2: 'mean_kl = 0.1' is no limit"),
        ("mean_kl", "line 1: 'mean_kl' is no limit"),
        ("mean_kl <= much", "line 1: 'much' is no number"),
        ("mean_kl <= nan", "line 1: 'nan' is no number"),
        ("kl <= 1", "line 1: there is no metric 'kl'"),
        ("\n\nprose: mean_kl <= 1", "line 3: there is no slice 'prose'"),
        ("docs: bytes <= 1", "line 1: bytes is one figure"),
        ("# nothing", "has no limits"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_malformed_gates(tmp_path: Path, text: str | bytes, message: str) -> None:
    gate = tmp_path / "gate"
    gate.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadInput, match=message):
        read_gate(gate, EXTENT)


def test_gates_on_what_will_not_be_measured(tmp_path: Path) -> None:
    """Refused before an hour's work, with the option that is missing."""
    gate = tmp_path / "gate"
    with pytest.raises(BadInput, match="cannot be read"):
        read_gate(gate, EXTENT)
    for text, extent, remedy in (
        ("top1 >= 0.9", replace(EXTENT, compared=False), "--reference"),
        ("free_kl <= 1", replace(EXTENT, prompts=0), "--free 3"),
        ("ood: free_kl <= 1", replace(EXTENT, prompts=2), "--free 3"),
        ("in_distribution: mean_kl <= 1", replace(EXTENT, marked=False), "overall, worst, docs"),
    ):
        gate.write_text(text)
        with pytest.raises(BadInput) as refusal:
            read_gate(gate, extent)
        assert remedy in refusal.value.remedy
    gate.write_text("perplexity <= 60\na: b: perplexity <= 60")
    assert [rule.scope for rule in read_gate(gate, replace(EXTENT, compared=False))] == ["overall", "a: b"]


def test_a_slice_far_worse_than_the_rest() -> None:
    """It fails when its whole interval lies beyond twice the overall KL, not for a point beyond it by chance."""
    overall = quality(exactly(0.01))

    def worst(**slices: Quality) -> Verdict:
        return judge(report(overall=overall, **slices))[0]

    chance = worst(docs=quality(exactly(0.008)), ood=quality(Estimate(0.03, 0.019, 0.05)))
    assert (chance.passed, chance.scope, chance.value) == (True, "ood", 0.03)
    broken = worst(docs=quality(Estimate(0.025, 0.021, 0.03)), ood=quality(Estimate(0.03, 0.019, 0.05)))
    assert (broken.passed, broken.scope, broken.low) == (False, "docs", 0.021)
    one_window = worst(docs=quality(Estimate(0.09, None, None)))
    assert one_window.passed
    same = judge(report(overall=quality(exactly(1e-9)), docs=quality(exactly(1e-7))))[0]
    assert same.passed  # rounding: both are nothing


@pytest.mark.parametrize(
    ("figure", "metric", "measured", "passed"),
    [
        ("excess_nll_nats", "free_excess_surprise", Estimate(0.3, 0.1, 0.5), True),
        ("excess_nll_nats", "free_excess_surprise", Estimate(1.5, 0.9, 3), True),
        ("excess_nll_nats", "free_excess_surprise", exactly(5), False),
        ("excess_repetition", "free_excess_repetition", exactly(0.5), False),
        ("mean_kl_nats", "free_kl", Estimate(0.11, 0.09, 0.2), True),
        ("mean_kl_nats", "free_kl", Estimate(0.11, 0.101, 0.2), False),
    ],
)
def test_answers_that_are_garbage(figure: str, metric: str, measured: Estimate, passed: bool) -> None:
    """Each by the measure that shows it; the KL on given text is 0.01."""
    overall = quality(exactly(0.01), answers={figure: measured})
    verdicts = judge(report(docs=overall, overall=overall))
    assert [verdict.metric for verdict in verdicts if not verdict.passed] == ([] if passed else [metric])


def test_the_page_names_every_metric() -> None:
    page = (Path(__file__).parents[3] / "docs" / "EVAL.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`([a-z0-9_]+)`", page)) >= set(METRICS)


TASKS = {"choice": ["acc", "acc_fall", "acc_rise"], "docs": ["exact_match,strict-match"]}


@pytest.mark.parametrize(
    ("line", "tasks", "words"),
    [
        ("choice: acc_norm >= 0.1", TASKS, "has no figure 'acc_norm'. It has: acc, acc_fall, acc_rise."),
        ("choice: mean_kl <= 0.1", TASKS, "has no figure 'mean_kl'"),
        ("acc >= 0.1", TASKS, "as in: choice: acc >= 0.5"),
        ("other: acc >= 0.1", TASKS, "as in: choice: acc >= 0.5"),
        ("other: mean_kl <= 0.1", TASKS, "no slice or task 'other'"),
        ("choice: acc_fall <= 0.1", {"choice": ["acc"]}, "Give --reference."),
        ("docs: acc >= 0.1", {}, "no metric 'acc'"),
    ],
)
def test_a_limit_on_what_no_task_measures_is_refused(
    tmp_path: Path, line: str, tasks: dict[str, list[str]], words: str
) -> None:
    """With its line, before anything runs."""
    gate = tmp_path / "gate"
    gate.write_text(f"{line}\n")
    extent = replace(EXTENT, tasks=tasks, compared="acc_fall" in tasks.get("choice", ()))
    with pytest.raises(BadInput) as refused:
        read_gate(gate, extent)
    assert "line 1: " in refused.value.one_line()
    assert words in refused.value.one_line()


def test_tasks_are_judged_by_their_figures(found: QualityReport, tmp_path: Path) -> None:
    """By what fell or rose too; a slice of a task's name keeps the metrics of texts; a text is not needed."""
    gate = tmp_path / "gate"
    gate.write_text("choice: acc_fall <= 0.02\ndocs: exact_match,strict-match > 0.3\ndocs: mean_kl <= 0.02\n")
    figures = estimates(
        [
            TaskFigure("choice", "acc", 0.47, 0.02, 100, reference=0.5, change_stderr=0.01),
            TaskFigure("docs", "exact_match (strict-match)", 0.4, None, 10),
        ]
    )
    rules = read_gate(gate, replace(EXTENT, tasks=figures))
    verdicts = judge(found, rules, figures)[:3]
    assert [verdict.passed for verdict in verdicts] == [False, True, True]
    fell = verdicts[0]
    assert (fell.value, fell.low, fell.high) == pytest.approx((0.03, 0.0104, 0.0496))
    alone = replace(EXTENT, slices=(), kinds=(), marked=False, tasks=figures)
    with pytest.raises(BadInput, match=r"line 3: .*has no figure 'mean_kl'"):
        read_gate(gate, alone)
    gate.write_text("bytes <= 3\n")
    with pytest.raises(BadInput, match="needs text"):
        read_gate(gate, alone)
    assert [verdict.passed for verdict in judge_tasks(rules[:2], figures)] == [False, True]
