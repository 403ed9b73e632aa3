"""What an engine may be told."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pocketmoe.errors import BadInput
from pocketmoe.runtime.engine.options import EngineOptions


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("backend", ["foo", "", None, 3]),
        ("prefetch", ["always", "", None, True]),
        ("capacity", [0, -1, 1.5, None]),
        ("threads", [0, -2, "2"]),
        ("chunk", [0, -128, 12.8]),
        ("drop_cold", [-0.1, 1.01, math.nan, math.inf, "0"]),
        ("prefer_cached", [-0.1, 1.01, math.nan, None]),
        ("read_bytes_per_s", [0, -1.0, math.inf, math.nan, "1GB"]),
    ],
)
def test_a_value_that_an_option_does_not_have_is_refused_by_name(option: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(BadInput, match=f"option {option} is"):
            EngineOptions(**{option: value})


def test_what_an_option_has_is_taken() -> None:
    """The ends of each range too."""
    made = EngineOptions(capacity=1, threads=1, chunk=1, drop_cold=1, prefer_cached=1.0, read_bytes_per_s=1)
    assert not made.exact
    assert made.exactly().exact
    for backend in ("auto", "slots", "sessions", lambda *_: None):
        EngineOptions(backend=backend)  # type: ignore[arg-type]
    for prefetch in ("auto", "on", "off"):
        EngineOptions(prefetch=prefetch)
