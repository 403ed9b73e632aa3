"""Mixed precision: the budget is kept, the plan is what was done, and the runtime does not mind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.resume import Work
from pocketmoe.bundle.store import ExpertId
from pocketmoe.calibration import Calibration, ExpertSample
from pocketmoe.errors import BadInput, SizeTooSmall
from pocketmoe.profiles.calibration.calibrate import calibrate
from pocketmoe.profiles.quality.quality import Slice, evaluate
from pocketmoe.quantize.apply import quantize_bundle
from pocketmoe.quantize.experts import KindQuantizer
from pocketmoe.quantize.mixed.choose import MOST_KINDS, Costs, make_plan, measure_costs, scheme_of
from pocketmoe.quantize.plan import PLAN, QuantizationPlan, SizeBudget
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from tests import bundles
from tests.quantize.graphs.test_caches import letters
from tests.test_cli import pocketmoe

TinyBundle = Callable[[str], Bundle]
TEXT = [Slice("text", letters(0))]


def total(bundle: Bundle) -> int:
    return sum(entry.nbytes for entry in bundle.manifest.files.values())


@pytest.fixture(scope="module")
def calibration(tiny_bundle: TinyBundle, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    return calibrate(tiny_bundle("olmoe"), TEXT, scratch=tmp_path_factory.mktemp("scratch"), tokens=1024)


@pytest.fixture(scope="module")
def costs(tiny_bundle: TinyBundle, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Costs:
    bundle = tiny_bundle("olmoe")

    def measure(variant: Bundle) -> float:
        found = evaluate(variant, TEXT, reference=bundle, max_tokens=200).overall.divergence
        assert found is not None
        return found.mean_kl_nats.value

    work = Work(tmp_path_factory.mktemp("variants"))
    return measure_costs(bundle, calibration, algorithm="nearest", measure=measure, work=work)


@pytest.fixture(scope="module")
def mixed(
    tiny_bundle: TinyBundle, calibration: Calibration, costs: Costs, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    plan = make_plan(tiny_bundle("olmoe"), costs, SizeBudget(bits=4.2), None)
    return quantize_bundle(
        tiny_bundle("olmoe").root,
        tmp_path_factory.mktemp("mixed") / "mixed",
        scheme=scheme_of(plan, "nearest"),
        calibration=calibration,
        plan=plan,
    )


@pytest.mark.parametrize("share", [0.17, 0.2, 0.25])
def test_the_bundle_is_no_larger_than_was_asked_for(
    tiny_bundle: TinyBundle, calibration: Calibration, costs: Costs, tmp_path: Path, share: float
) -> None:
    """And not much smaller, by what the plan reserves for lines of text."""
    source = tiny_bundle("olmoe")
    plan = make_plan(source, costs, SizeBudget(share=share), None)
    made = quantize_bundle(
        source.root, tmp_path / "q", scheme=scheme_of(plan, "nearest"), calibration=calibration, plan=plan
    )
    assert 0.9 * plan.expected_bytes < total(made) <= plan.expected_bytes <= share * total(source)


def test_more_bytes_never_cost_quality(tiny_bundle: TinyBundle, costs: Costs) -> None:
    plans = [make_plan(tiny_bundle("olmoe"), costs, SizeBudget(bits=bits), None) for bits in (3.4, 4.0, 5.0, 7.0)]
    losses = [plan.expected_kl for plan in plans]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 2 * losses[-1] > 0
    assert all(plan.mean_bits <= bits for plan, bits in zip(plans, (3.4, 4.0, 5.0, 7.0), strict=True))


def test_the_plan_is_what_was_done(mixed: Bundle) -> None:
    plan = msgspec.json.decode(mixed.check_file(PLAN).read_bytes(), type=QuantizationPlan)
    assert 1 < len(mixed.manifest.expert_kinds) <= MOST_KINDS
    with mixed.open_store() as store:
        for planned in plan.experts:
            kind = mixed.manifest.expert_kinds[store.records[ExpertId(planned.layer, planned.expert)].kind]
            assert kind.scheme == " + ".join(dict.fromkeys(planned.formats))
    for role, planned in plan.dense.items():
        assert {t.scheme for t in mixed.manifest.dense if t.role == role} == {planned.format}
    assert list(mixed.verify()) == []


def test_experts_that_another_plan_made_are_copied(
    tiny_bundle: TinyBundle,
    calibration: Calibration,
    mixed: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those that have the same formats in both plans, and no byte is another for it."""
    source = tiny_bundle("olmoe")
    before = msgspec.json.decode(mixed.check_file(PLAN).read_bytes(), type=QuantizationPlan)
    first, second = before.experts[0], next(e for e in before.experts if e.formats != before.experts[0].formats)
    swapped = {first: second.formats, second: first.formats}
    experts = tuple(msgspec.structs.replace(e, formats=swapped.get(e, e.formats)) for e in before.experts)
    plan = msgspec.structs.replace(before, experts=experts)
    converted: list[str] = []
    real = KindQuantizer.convert

    def convert(self: KindQuantizer, record: memoryview, name: str, sample: ExpertSample | None) -> object:
        converted.append(name)
        return real(self, record, name, sample)

    monkeypatch.setattr(KindQuantizer, "convert", convert)

    def files(name: str, made: Bundle | None) -> dict[str, bytes]:
        converted.clear()
        scheme = scheme_of(plan, "nearest")
        return bundles.tree(
            quantize_bundle(
                source.root, tmp_path / name, scheme=scheme, calibration=calibration, plan=plan, made=made
            ).root
        )

    truth = files("anew", None)
    assert len(converted) == len(plan.experts)
    assert files("copied", mixed) == truth
    assert sorted(converted) == sorted(f"layer {e.layer}, expert {e.expert}" for e in swapped)


def test_same_bits_at_every_budget_and_backend(mixed: Bundle) -> None:
    """Slots of several sizes: what is resident, and how it got there, changes nothing."""

    def logits(memory: str, backend: str, threads: int) -> np.ndarray:
        options = EngineOptions(MemoryRequest.parse(memory), 64, threads, backend)  # type: ignore[arg-type]
        with Engine(mixed, options) as engine:
            assert len(engine.opened.slots) == len(mixed.manifest.expert_kinds)
            return np.concatenate([engine.feed([*range(5, 25)], rows="all"), *(engine.feed([t]) for t in (7, 300, 9))])

    truth = logits("100%", "sessions", 1)
    for other in (
        ("100%", "slots", 2),
        ("30%", "slots", 1),
        ("5%", "slots", 2),
        ("20%", "sessions", 2),
    ):
        np.testing.assert_array_equal(logits(*other), truth)


def test_what_calibration_missed_keeps_four_bits(tiny_bundle: TinyBundle, costs: Costs) -> None:
    missed = ExpertId(2, 4)
    experts = {**costs.experts, missed: replace(costs.experts[missed], reached=False, share=1e-9)}
    plan = make_plan(tiny_bundle("olmoe"), replace(costs, experts=experts), SizeBudget(bits=3.3), None)
    (found,) = (e for e in plan.experts if (e.layer, e.expert) == missed)
    assert all(label.startswith(("int4", "int8")) for label in found.formats)
    assert any(label.startswith("int2") for e in plan.experts for label in e.formats)


def test_a_budget_that_cannot_be_met_says_what_can(tiny_bundle: TinyBundle, costs: Costs) -> None:
    bundle = tiny_bundle("olmoe")
    with pytest.raises(SizeTooSmall, match=r"--size-budget 0\.010MB cannot be met") as caught:
        make_plan(bundle, costs, SizeBudget(total_bytes=10_000), None)
    assert caught.value.exit_code == 4
    assert make_plan(bundle, costs, SizeBudget(total_bytes=caught.value.least_bytes), None).mean_bits < 4
    with pytest.raises(SizeTooSmall, match=r"--fetch-budget"):
        make_plan(bundle, costs, None, 10.0)
    with pytest.raises(BadInput, match="needs a budget"):
        make_plan(bundle, costs, None, None)


def test_bytes_fetched_per_token_bind_too(tiny_bundle: TinyBundle, costs: Costs) -> None:
    bundle = tiny_bundle("olmoe")
    free = make_plan(bundle, costs, SizeBudget(bits=6), None)
    tight = make_plan(bundle, costs, SizeBudget(bits=6), 0.7 * free.expected_fetched_bytes_per_token)
    assert tight.expected_fetched_bytes_per_token <= 0.7 * free.expected_fetched_bytes_per_token
    assert tight.expected_kl > free.expected_kl


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("9.5MB", SizeBudget(total_bytes=9_500_000)),
        ("1GiB", SizeBudget(total_bytes=1 << 30)),
        ("40%", SizeBudget(share=0.4)),
        ("3.5bits", SizeBudget(bits=3.5)),
    ],
)
def test_size_budgets(text: str, budget: SizeBudget) -> None:
    assert SizeBudget.parse(text) == budget
    for wrong in ("", "x", "0MB", "-3%", "3.5", "1.2.3MB", "9 bytes"):
        with pytest.raises(ValueError, match=r"no size|not a size"):
            SizeBudget.parse(wrong)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--scheme", "mixed", "--size-budget", "4bits"), "need --calibration TEXT"),
        (("--scheme", "mixed", "--calibration", "TEXT"), "needs --size-budget or --fetch-budget"),
        (("--scheme", "int4", "--size-budget", "9MB"), "for it alone"),
        (("--scheme", "mixed", "--fetch-budget", "40%", "--calibration", "TEXT"), "is not a size"),
        (("--rounding", "gptq"), "need --calibration TEXT"),
        (("--format", "experts=int3-b64"), "is no format"),
        (("--scheme", "keep", "--format", "experts=int8-b64"), "does not go with --scheme keep"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_anything_is_measured(
    tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    refused = pocketmoe("quantize", tmp_path / "nothing", "-o", tmp_path / "q", *options)
    assert refused.returncode == 2
    assert words in refused.stderr


def test_a_quantized_source_is_refused_before_calibrating(mixed: Bundle, tmp_path: Path) -> None:
    refused = pocketmoe("quantize", mixed.root, "-o", tmp_path / "q", "--calibration", tmp_path / "no text")
    assert refused.returncode == 3
    assert "is quantized already" in refused.stderr
