"""A profile and predictions as aligned text, and predictions as what `--json` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pocketmoe.profiles.estimate.device_prediction import DevicePrediction, worst_error
from pocketmoe.profiles.estimate.predict import Checked, Prediction, check_predictions
from pocketmoe.profiles.profile import Profile
from pocketmoe.profiles.report.columns import as_text
from pocketmoe.profiles.report.headline import headline, untouched
from pocketmoe.profiles.report.page import error_words
from pocketmoe.profiles.report.profile_columns import MEASURED, PREDICTED


def profile_table(profile: Profile) -> str:
    """A row for each run, with what would have been predicted for it."""
    checked = check_predictions(profile)
    said = headline(untouched(profile))
    return "\n".join(
        [said, *as_text(MEASURED, checked), f"Error of what was predicted for each run: {error_words(checked)}"]
    )


def prediction_table(found: DevicePrediction) -> str:
    """What a device would do, what that assumes, and how far such predictions are off on the profiled machine."""
    return "\n".join(
        [
            f"{found.title}, all of it predicted:",
            *as_text(PREDICTED, found.budgets),
            f"Assumed: {'; '.join(found.assumptions)}.",
            f"On the profiled machine: {error_words(found.checked)}",
        ]
    )


def predictions_json(profile: Profile, predictions: Sequence[DevicePrediction]) -> dict[str, Any]:
    """The fields of `profile --predict --json`."""
    checked = check_predictions(profile)
    return {
        "profile": profile,
        "predictions": [
            {
                "device": found.device,
                "title": found.title,
                "assumptions": list(found.assumptions),
                "sources": list(found.sources),
                "budgets": [
                    {
                        "memory_budget_bytes": b.memory_budget_bytes,
                        "tokens_per_s_low": b.tokens_per_s_low,
                        "tokens_per_s_high": b.tokens_per_s_high,
                        **_fields(b.prediction),
                    }
                    for b in found.budgets
                ],
            }
            for found in predictions
        ],
        "checked": [_check(entry) for entry in checked],
        "worst_error": worst_error(checked),
    }


def _check(entry: Checked) -> dict[str, Any]:
    return {
        "memory": entry.run.memory,
        "read_bytes_per_s": entry.run.read_bytes_per_s,
        "measured_tokens_per_s": entry.run.decode_tokens_per_s,
        "predicted_tokens_per_s": entry.prediction.tokens_per_s,
        "error": entry.error,
        "calibrated": entry.calibrated,
    }


def _fields(predicted: Prediction) -> dict[str, Any]:
    return {
        "expert_slots": predicted.expert_slots,
        "expert_share": predicted.expert_share,
        "tokens_per_s": predicted.tokens_per_s,
        "hit_rate": predicted.hit_rate,
        "bytes_read_per_token": predicted.bytes_read_per_token,
        "waiting_s": predicted.waiting_s,
    }
