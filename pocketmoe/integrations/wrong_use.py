"""What of transformers' loading and generation is refused, by name: nothing is ignored that would change an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode

from pocketmoe.errors import BadInput

_USUAL: dict[str, tuple[Any, ...]] = {  # options of other models' from_pretrained, and what of them is as it is here
    "device_map": ("cpu", "auto"),
    "dtype": ("auto", "float32", torch.float32),
    "torch_dtype": ("auto", "float32", torch.float32),
    "low_cpu_mem_usage": (True, False),
    "use_cache": (True,),
    "use_safetensors": (True,),
    "attn_implementation": (),
    "quantization_config": (),
    "provider": ("CPUExecutionProvider",),
}
_MODES = {
    GenerationMode.BEAM_SEARCH: "beams (num_beams): each would need a copy of its text's states at every step",
    GenerationMode.BEAM_SAMPLE: "beams (num_beams): each would need a copy of its text's states at every step",
    GenerationMode.GROUP_BEAM_SEARCH: "beams (num_beam_groups)",
    GenerationMode.CONSTRAINED_BEAM_SEARCH: "beams (constraints, force_words_ids)",
    GenerationMode.CONTRASTIVE_SEARCH: "contrastive search (penalty_alpha): it needs hidden states",
    GenerationMode.DOLA_GENERATION: "DoLa (dola_layers): it needs hidden states",
    GenerationMode.ASSISTED_GENERATION: "assisted generation (assistant_model, prompt_lookup_num_tokens)",
}
_REMEDY = "Generate greedily or by sampling: num_beams=1, do_sample=True or False."


def refuse_options(given: Mapping[str, Any]) -> None:
    """Raises BadInput for what from_pretrained has no use for."""
    for name, value in given.items():
        if name not in _USUAL:
            raise BadInput(f"from_pretrained has no option {name}", "docs/OPTIMUM.md has a list.")
        if value is not None and value not in _USUAL[name]:
            raise BadInput(
                f"from_pretrained does not take {name}={value!r}: a bundle computes in float32 on the CPU",
                f"Leave out {name}; how weights are stored is a matter of the bundle (scheme).",
            )


def refuse_making(given: Mapping[str, Any]) -> None:
    """Raises BadInput for options of an export where there is none."""
    for name, value in given.items():
        if value is not None:
            raise BadInput(
                f"{name} is for checkpoints: it says how a bundle is made", "Say export=True, or leave it out."
            )


def refuse_generation(config: GenerationConfig) -> None:
    """Raises BadInput for ways to generate that are not offered."""
    mode = config.get_generation_mode(None)
    if mode in _MODES:
        raise BadInput(f"PocketMoE does not generate by {_MODES[mode]}", _REMEDY)
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name):
            raise BadInput(f"PocketMoE does not give what {name} asks for", f"Leave out {name}; output_logits works.")
    for name in ("cache_implementation", "cache_config", "prefill_chunk_size"):
        if getattr(config, name, None):
            raise BadInput(
                f"{name}={getattr(config, name)!r} has no meaning here: the engine has caches and chunks of its own",
                f"Leave out {name}.",
            )


def refuse_arguments(assistant_model: Any, custom_generate: Any) -> None:
    """Raises BadInput for arguments of `generate` that are not offered."""
    if assistant_model is not None:
        raise BadInput(f"PocketMoE does not generate by {_MODES[GenerationMode.ASSISTED_GENERATION]}", _REMEDY)
    if isinstance(custom_generate, str):
        raise BadInput(f"custom_generate={custom_generate!r} would run code from the hub", "Give a function instead.")


def refuse_inputs(given: Mapping[str, Any]) -> None:
    """Raises BadInput for inputs of other models' forward that are not offered."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise BadInput(
                f"PocketMoE's forward does not take {name}", "Give input_ids, and attention_mask for padding."
            )


def checked_ids(input_ids: Any, vocab_size: int) -> list[list[int]]:
    """The token ids of a tensor, int64 [rows, tokens], by rows. Raises BadInput."""
    if (
        not isinstance(input_ids, torch.Tensor)
        or input_ids.ndim != 2
        or input_ids.dtype not in (torch.int64, torch.int32)
    ):
        tensor = isinstance(input_ids, torch.Tensor)
        kind = f"{input_ids.dtype} {[*input_ids.shape]}" if tensor else type(input_ids).__name__
        raise BadInput(f"input_ids are {kind}, not int64 [texts, tokens]", 'Use tokenizer(..., return_tensors="pt").')
    if not input_ids.numel():
        raise BadInput("input_ids hold no token", "Give some text.")
    rows = cast("list[list[int]]", input_ids.tolist())  # pyright: ignore[reportUnknownMemberType]
    largest, least = max(map(max, rows)), min(map(min, rows))
    if least < 0 or largest >= vocab_size:
        worst = largest if largest >= vocab_size else least
        raise BadInput(f"token {worst} is not in the model's vocabulary of {vocab_size}", "Use the bundle's tokenizer.")
    return rows


def padding_of(mask: torch.Tensor | None, shape: tuple[int, int]) -> list[int]:
    """How many tokens on the left of each row are none of its text, by its mask, int or bool [batch, tokens].

    Raises BadInput for any other mask.
    """
    if mask is None:
        return [0] * shape[0]
    if tuple(mask.shape) != shape:
        raise BadInput(f"attention_mask is {list(mask.shape)}, not {list(shape)}", "Give one entry for each token.")
    if bool(mask.all()):
        return [0] * shape[0]
    ones = mask != 0
    counts = ones.sum(dim=1)
    if not bool(counts.all()):
        raise BadInput("attention_mask leaves a text without a token", "Give each row some text.")
    left: list[int] = [shape[1] - int(count) for count in counts]
    if not all(bool(row[start:].all()) for row, start in zip(ones, left, strict=True)):
        raise BadInput(
            "attention_mask has zeros after or between the tokens of a text",
            'Pad on the left: tokenizer.padding_side = "left".',
        )
    return left
