"""What transformers wants to know of a bundle's model: its configuration, and how its authors generate."""

from __future__ import annotations

from typing import Any, Self

from transformers import GenerationConfig, PreTrainedConfig

from pocketmoe.bundle.manifest import Manifest


class PocketMoEConfig(PreTrainedConfig):
    """What transformers wants to know of a bundle's model."""

    model_type = "pocketmoe"

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """Of the model that a manifest describes."""
        model = manifest.model
        fields: dict[str, Any] = {
            "architectures": [model.architecture],
            "vocab_size": model.vocab_size,
            "hidden_size": model.hidden_size,
            "max_position_embeddings": model.context_length,
            "bos_token_id": model.bos_token_id,
            "eos_token_id": list(model.eos_token_ids) or None,
            "is_encoder_decoder": False,
            "dtype": "float32",
            "source_model_type": model.model_type,
        }
        return cls(**fields)


def generation_config_of(manifest: Manifest) -> GenerationConfig:
    """How the model's authors generate, as their generation_config.json has it."""
    model, sampling = manifest.model, manifest.sampling
    given: dict[str, Any] = {
        "bos_token_id": model.bos_token_id,
        "eos_token_id": list(model.eos_token_ids) or None,
    }
    for name in sampling.__struct_fields__ if sampling else ():
        given[name] = getattr(sampling, name)
    return GenerationConfig(**{name: value for name, value in given.items() if value is not None})
