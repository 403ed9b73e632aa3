"""Requests with faults, and bytes that are none, as `python -m tests.serve.malformed` sends them by the thousand."""

from __future__ import annotations

from tests.serve.client import Running
from tests.serve.malformed import campaign

CASES = 250


def test_strangers_requests_are_answered_or_refused(speaking: Running) -> None:
    """Nothing is an error of the server's, and the good request after them is answered as the one before."""
    speaking.lines.clear()
    counts, faults = campaign(speaking.port, 1, range(CASES))
    assert faults == []
    assert not [line for line in speaking.lines if line["event"] != "request"]
    assert {ending.split()[0] for ending in counts} == {"described", "faulty", "http", "bytes"}
    assert sum(count for ending, count in counts.items() if ending.endswith("200")) > CASES / 20
