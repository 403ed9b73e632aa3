"""Helpers that go through a list of jobs with the caller."""

from __future__ import annotations

import threading
import time

import pytest

from pocketmoe.runtime.paging.workers import Workers
from tests.hang import HANG_S


@pytest.mark.parametrize("helpers", [0, 1, 3])
def test_every_job_is_done_once_and_over_when_run_returns(helpers: int) -> None:
    workers = Workers(helpers)
    try:
        for count in (0, 1, 2, 5, 40):
            done: list[int] = []

            def job(item: int, done: list[int] = done) -> None:
                time.sleep(0.0002)
                done.append(item)

            workers.run(range(count), job)
            assert sorted(done) == list(range(count))
    finally:
        workers.close()


def test_jobs_run_at_the_same_time() -> None:
    """Two jobs that wait for each other both end: one of them is a helper's."""
    workers, meeting = Workers(1), threading.Barrier(2, timeout=HANG_S)
    try:
        workers.run([0, 1], lambda _: meeting.wait())
    finally:
        workers.close()


@pytest.mark.parametrize("helpers", [0, 2])
def test_an_error_reaches_the_caller_and_the_next_list_is_done(helpers: int) -> None:
    workers = Workers(helpers)

    def fail(item: int) -> None:
        if item == 3:
            raise ValueError("job 3")

    try:
        with pytest.raises(ValueError, match="job 3"):
            workers.run(range(20), fail)
        done: list[int] = []
        workers.run(range(4), done.append)
        assert sorted(done) == [0, 1, 2, 3]
    finally:
        workers.close()
