"""Who runs where while an engine is fed."""

import os
from collections.abc import Callable

import pytest

from pocketmoe.bundle.reader import Bundle
from pocketmoe.runtime.engine.affinity import OwnCpu
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.system.cpus import thread_ids

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one CPU only")


def test_helpers_stay_off_the_cpu_of_the_thread_that_feeds(tiny_bundle: Callable[[str], Bundle]) -> None:
    """While fed, one CPU for the thread and the others for all that opening started; afterwards as it was."""
    bundle = tiny_bundle("olmoe")
    allowed, before = os.sched_getaffinity(0), thread_ids()
    options = EngineOptions(MemoryRequest(expert_share=0.2), capacity=32, threads=2)
    with Engine(bundle, options) as engine:
        seen: list[set[int]] = []
        engine.on_routes = lambda _layer, _ids: seen.append(os.sched_getaffinity(0))
        engine.feed(range(1, 9))
        assert all(cpus == allowed for cpus in seen), "a prompt runs anywhere"
        seen.clear()
        engine.feed([9])
        helpers = thread_ids() - before
        assert helpers
        (own,) = seen[0]
        assert all(cpus == {own} for cpus in seen)
        assert all(os.sched_getaffinity(helper) == allowed - {own} for helper in helpers)
        assert os.sched_getaffinity(0) == allowed

        def fail(*_: object) -> None:
            raise ZeroDivisionError

        engine.on_routes = fail
        with pytest.raises(ZeroDivisionError):
            engine.feed([1])
        assert os.sched_getaffinity(0) == allowed


def test_one_cpu_is_shared() -> None:
    """Where the process may use one CPU, nothing is placed."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        with OwnCpu([]):
            assert os.sched_getaffinity(0) == {min(allowed)}
    finally:
        os.sched_setaffinity(0, allowed)
