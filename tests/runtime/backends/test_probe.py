"""The slot self-test without a bundle."""

from __future__ import annotations

import pytest

from pocketmoe.bundle.store import ExpertId
from pocketmoe.runtime.backends import probe
from pocketmoe.runtime.backends.slots import MappedSlot, SlotsUnavailable
from tests.bundles import scratch_folders


def test_the_shipped_graph_is_the_one_its_script_makes() -> None:
    onnx = pytest.importorskip("onnx")
    from tests.runtime.backends.make_probe import probe_model

    shipped = onnx.load(probe.GRAPH, load_external_data=False)
    assert shipped == probe_model()
    last = {entry.key: entry.value for entry in shipped.graph.initializer[-1].external_data}
    assert len(probe.probe_record(0)) == int(last["offset"]) + int(last["length"])


def test_swapping_works_here_and_leaves_nothing_behind() -> None:
    assert probe.probe_slots() == ""
    assert not scratch_folders()


def test_a_swap_without_effect_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_nothing(_slot: MappedSlot, _expert: ExpertId) -> int:
        return 0

    monkeypatch.setattr(MappedSlot, "load", load_nothing)
    assert "did not give that expert's result" in probe.probe_slots()


@pytest.mark.parametrize("error", [SlotsUnavailable("no room"), OSError(28, "No space left on device")])
def test_whatever_goes_wrong_is_a_reason_and_not_a_crash(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(probe, "pack_into", fail)
    reason = probe.probe_slots()
    assert ("no room" in reason) or ("No space left" in reason)
    assert not scratch_folders()
