"""Ctrl-C while torch traces a model."""

from __future__ import annotations

import _thread
import threading

import pytest

from pocketmoe.export.capture.capture import in_a_thread
from tests.hang import HANG_S


def test_an_interrupt_does_not_reach_into_what_is_computed() -> None:
    """It is raised in the thread that waits, at once; what is computed meanwhile sees nothing of it."""
    release, seen = threading.Event(), []

    def compute() -> None:
        _thread.interrupt_main()
        seen.append(release.wait(HANG_S))
        finished.set()

    finished = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        in_a_thread(compute)
    assert seen == []
    release.set()
    assert finished.wait(HANG_S)
    assert seen == [True]


def test_results_and_errors_come_back() -> None:
    """As if it had been called here."""
    assert in_a_thread(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        in_a_thread(lambda: 1 // 0)
