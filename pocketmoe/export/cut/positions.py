"""Positions that depend on the length of the whole text (longrope): what a bundle must say of them.

transformers chooses the rotary tables by the last position of a forward pass, short ones up to the original context,
long ones beyond. Here a prompt is computed in chunks, so the graph is told where the text ends (`lengths`). What an
answer that grows beyond the original context does with the keys it has is the model's own affair: most keep them as
they are, Phi computes the text anew.
"""

from __future__ import annotations

from typing import Any

import torch

from pocketmoe.bundle.manifest import Inputs
from pocketmoe.errors import UnsupportedModel

_LONGROPE = "longrope"


def check_inputs(model: Any, inputs: Inputs) -> None:
    """Raises UnsupportedModel where tables follow from the text's length and the graph is not told of it."""
    if _has_longrope(model) and inputs.last_position is None:
        raise UnsupportedModel(
            f"{type(model).__name__} has rotary tables by the length of the text (longrope), in a form that cannot be "
            "computed in chunks",
            "This form of longrope is not supported yet.",
        )


def computed_anew_beyond(model: Any) -> int | None:
    """The length in tokens beyond which the model's own generation drops its cache; None where it never does.

    Asked of the model itself: with the text one token longer than the cache, does it go on from the cache?
    """
    limit = getattr(model.config.get_text_config(), "original_max_position_embeddings", None)
    if not isinstance(limit, int) or not _has_longrope(model):
        return None
    from transformers import DynamicCache

    past, one = DynamicCache(), torch.zeros(1, 1, limit, 1)
    past.update(one, one, 0)
    ids = torch.zeros(1, limit + 1, dtype=torch.int64)
    going_on = model.prepare_inputs_for_generation(
        ids, past_key_values=past, attention_mask=torch.ones_like(ids), use_cache=True
    )
    return None if going_on.get("past_key_values") is past else limit


def _has_longrope(model: Any) -> bool:
    kinds = [getattr(module, "rope_type", None) for module in model.modules()]
    return any(_LONGROPE in (kind.values() if isinstance(kind, dict) else (kind,)) for kind in kinds)
