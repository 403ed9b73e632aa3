"""Predictions on a made-up profile whose arithmetic can be done by hand."""

from __future__ import annotations

import msgspec
import pytest

from pocketmoe.errors import BudgetTooSmall
from pocketmoe.profiles.catalogue.devices import find_device
from pocketmoe.profiles.estimate.classes import class_costs, machine_of_device, machine_of_profile
from pocketmoe.profiles.estimate.device_prediction import costs_on, moved_of_profile, predict_device, worst_error
from pocketmoe.profiles.estimate.predict import check_predictions, costs_here, predict, slowed
from tests.profiles import made_up

# Computing is the same at both ends, 4 + 2 + 1 ms, so that waits are all that differs. An expert computes for 0.5 ms.
STEADY = made_up.profile()


def test_waits_are_reads_that_nothing_hides() -> None:
    """A layer's first read takes 2 ms and each more 1 ms; experts that are there compute meanwhile."""
    here = costs_here(STEADY)
    none, one, both = (predict(STEADY, here, slots) for slots in (16, 8, 2))
    assert none.waiting_s == 0
    assert none.step_s == pytest.approx(0.007)
    assert one.waiting_s == pytest.approx(2 * (0.002 - 0.0005))
    assert both.waiting_s == pytest.approx(2 * 0.002 * 2), "with two slots a read does not overlap with another"
    assert (both.hit_rate, one.hit_rate, none.hit_rate) == (0.0, 0.5, 1.0)
    assert one.bytes_read_per_token == 2 * 1_000_000
    between = predict(STEADY, here, 12)
    assert between.hit_rate == pytest.approx(0.75), "half way between two points of the curve"


def test_a_slower_disk_only_lengthens_the_waits() -> None:
    """At 100 MB/s each read of 1 MB takes 10 ms; a faster disk than the real one changes nothing."""
    here = costs_here(STEADY)
    slow = predict(STEADY, slowed(here, STEADY, 100e6), 8)
    assert slow.waiting_s == pytest.approx(2 * (0.010 - 0.0005))
    assert slow.compute == predict(STEADY, here, 8).compute
    assert slowed(here, STEADY, 1e12) == here


def test_runs_between_the_ends_are_predicted_and_the_error_said() -> None:
    """The ends are calibrated on; a run between them, and a slowed one, are judged."""
    between = made_up.run(8, step_median_s=0.011, decode_tokens_per_s=1 / 0.011)
    slow = made_up.run(8, read_bytes_per_s=100e6, step_median_s=0.026, decode_tokens_per_s=1 / 0.026)
    checked = check_predictions(made_up.profile(made_up.run(2), between, made_up.run(16), slow))
    assert [entry.calibrated for entry in checked] == [True, False, True, False]
    assert checked[1].error == pytest.approx(0.011 / 0.010 - 1)
    assert checked[3].error == pytest.approx(0)
    assert worst_error(checked) == pytest.approx(0.1)
    assert worst_error(check_predictions(STEADY)) is None


def test_computing_after_waits_is_as_slow_as_it_was_measured() -> None:
    """What the run with the least memory took to compute is what is predicted for it; in between lies between."""
    tired = made_up.run(2, step_median_s=0.024, step=msgspec.structs.replace(made_up.run(2).step, mean_s=0.024))
    profile = made_up.profile(tired, made_up.run(16))
    here = costs_here(profile)
    assert predict(profile, here, 2).compute.segments_s == pytest.approx(0.4 * 0.024)
    assert predict(profile, here, 16).compute.segments_s == pytest.approx(0.004)
    assert 0.004 < predict(profile, here, 8).compute.segments_s < 0.4 * 0.024
    late = predict(profile, slowed(here, profile, 1e6), 2).compute.segments_s
    assert late == pytest.approx(0.4 * 0.024), "beyond what was measured nothing is assumed"


def test_predictions_that_were_right_shorten_waits() -> None:
    """They are read while the disk is idle; wrong ones gain nothing."""
    right, wrong = (
        made_up.profile(*(made_up.run(n, prefetch_precision=p) for n in (8, 16)), settings=msgspec.structs.replace(
            STEADY.settings, prefetch="on"))
        for p in (1.0, 0.0)
    )  # fmt: skip
    assert predict(right, costs_here(right), 8).waiting_s < predict(wrong, costs_here(wrong), 8).waiting_s
    assert predict(wrong, costs_here(wrong), 8).waiting_s == predict(STEADY, costs_here(STEADY), 8).waiting_s


def test_another_machine_costs_what_its_class_does_as_far_off_as_here() -> None:
    """Its class's costs for this model, times what the model took here over what this machine's class would take."""
    device = find_device("pi5-8gb")
    moved = moved_of_profile(STEADY)
    here, there = costs_here(STEADY), costs_on(STEADY, device)
    by_class = class_costs(machine_of_device("", device, 0), moved)
    taught = here.steady.total_s / class_costs(machine_of_profile(STEADY), moved).steady.total_s
    factor = min(2.0, max(0.5, taught))
    assert there.steady.segments_s == pytest.approx(factor * by_class.steady.segments_s)
    assert there.steady.experts_s == pytest.approx(factor * by_class.steady.experts_s)
    assert there.read_one_s == pytest.approx(1e6 / device.disk_bytes_per_s(1e6))
    found = predict_device(STEADY, "pi5-8gb", device)
    assert [budget.prediction.expert_slots for budget in found.budgets] == [4, 8, 12, 16]
    speeds = [budget.prediction.tokens_per_s for budget in found.budgets]
    assert speeds == sorted(speeds)
    for budget in found.budgets:
        assert budget.tokens_per_s_low < budget.prediction.tokens_per_s < budget.tokens_per_s_high


def test_a_device_without_the_memory_is_refused() -> None:
    memory = msgspec.structs.replace(STEADY.memory, least_bytes=7 * 10**9)
    with pytest.raises(BudgetTooSmall):
        predict_device(msgspec.structs.replace(STEADY, memory=memory), "pi5-8gb", find_device("pi5-8gb"))


def test_computing_without_waits_is_never_made_up_beyond_reason() -> None:
    """From two runs that both waited long, what remains without waits stays a possible speed."""
    tired, less_tired = (
        made_up.run(n, step_median_s=s, step=msgspec.structs.replace(made_up.run(n).step, mean_s=s), read_more_s=0.002)
        for n, s in ((2, 0.030), (8, 0.010))
    )
    profile = made_up.profile(tired, less_tired)
    found = predict(profile, costs_here(profile), 16)
    assert found.compute.segments_s >= 0.004 / 3
    assert found.compute.experts_s >= 0.002 / 3
    assert 0 < found.step_s < 0.010
