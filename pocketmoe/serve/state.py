"""What the page shows of the machine, at /pocketmoe/state; to be asked again and again.

    budget_bytes, used_bytes, peak_bytes    of the whole process; 0 while no model is loaded
    claims          bytes of the budget, by what they were promised for
    running, waiting                        requests
    models          of each: id; loaded; resident: a text of 0 and 1 for each MoE layer, a sign for each expert, 1 for
                    one in memory; uses: how many tokens each expert was computed for since the model was loaded;
                    counts: hits, prefetch_hits, misses, bytes_read, and of steps that decode: tokens, busy_s, and
                    wait_s of that for experts, with nothing to compute

All of it is about the model, nothing about a text; but who watches the experts of one conversation closely can guess at
its words, so it needs the server's key as everything else does.
"""

from __future__ import annotations

import contextlib
from typing import Any

from pocketmoe.errors import BadInput
from pocketmoe.runtime.engine.statistics import Activity
from pocketmoe.serve.load import Admission
from pocketmoe.serve.models import Models

_UNLOADED: dict[str, Any] = {"loaded": False, "resident": [], "uses": [], "counts": {}}


def state(models: Models, admission: Admission) -> dict[str, Any]:
    """All of it as it is now."""
    activity = None
    if models.loaded:
        with contextlib.suppress(BadInput):  # it is just being closed
            activity = models.loaded.activity()
    loaded = _loaded(activity) if activity else {}
    return {
        "budget_bytes": activity.budget_bytes if activity else 0,
        "used_bytes": activity.used_bytes if activity else 0,
        "peak_bytes": activity.peak_bytes if activity else 0,
        "claims": activity.claims if activity else {},
        "running": admission.running,
        "waiting": admission.waiting,
        "models": [
            {"id": name, **_UNLOADED, **(loaded if name == models.loaded_name else {})} for name in models.bundles
        ],
    }


def _loaded(activity: Activity) -> dict[str, Any]:
    return {
        "loaded": True,
        "resident": ["".join("01"[int(there)] for there in layer) for layer in activity.residents],
        "uses": [counts.tolist() for counts in activity.expert_counts],
        "counts": {
            "hits": activity.hits,
            "prefetch_hits": activity.prefetch_hits,
            "misses": activity.misses,
            "bytes_read": activity.bytes_read,
            "wait_s": activity.waiting_s,
            "busy_s": activity.decoding_s,
            "tokens": activity.decoded_tokens,
        },
    }
