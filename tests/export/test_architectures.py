"""A few architectures that between them need every part of the export; docs/architectures.md has all of them.

The page is written by docs/generate_architectures.py out of the same comparison.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pocketmoe.bundle.reader import Bundle
from tests.export.architectures import PARITY, compare

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers making and loading the tiny models

ROWS = json.loads((Path(__file__).parents[2] / "docs" / "architectures.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type",
    [
        "qwen3_next",  # the gated delta rule, convolutions, a gated shared expert
        "granitemoehybrid",  # Mamba-2 and attention without positions
        "llama4_text",  # a registered form, complex rotations, attention in chunks
        "nemotron_h",  # experts without gate, dense layers of several kinds between
        "hy_v4",  # latent attention with sinks over the tokens that an indexer chooses
    ],
)
def test_same_as_transformers(
    model_type: str,
    tiny_checkpoint: Callable[[str], Path],
    tiny_bundle: Callable[[str], Bundle],
    tmp_path: Path,
) -> None:
    row = compare(model_type, tiny_checkpoint(model_type), tiny_bundle(model_type), tmp_path)
    assert row.works, row.reason


def test_the_table_is_honest_and_wide() -> None:
    """A row works exactly when its numbers say so; one that does not says why."""
    for row in ROWS:
        same = row["tokens_equal"] is True and row["max_abs_logit_diff"] <= PARITY
        assert row["works"] == same
        assert row["works"] or row["reason"]
    assert sum(row["works"] for row in ROWS) >= 45


def test_the_fast_path_is_every_architectures() -> None:
    """Slots in every scheme, with the bits of sessions, and no cache that a token copies; exceptions are named."""
    slow = {"jetmoe"}  # its caches are repeated the other way round
    for row in ROWS:
        if row["works"]:
            assert set(row["backends"].values()) == {"slots"}
            assert row["model_type"] in slow or row["caches_in_place"] == row["caches"]
