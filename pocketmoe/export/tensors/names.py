"""From the names of a checkpoint's tensors to those of a model's parameters, by transformers' own conversion mapping.

Where that leaves parameters without a tensor, the names of wrappers that training leaves in front (`module.`,
`_orig_mod.`, `base_model.model.`) are taken away, if every tensor then has its place; transformers would fill such a
model with random numbers and a warning.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch

_INNER = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # torch puts them in front of any module
_HARMLESS = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")  # buffers of older versions, computed today


@dataclass
class Source:
    """The checkpoint tensors that one conversion turns into one or more parameters."""

    converter: Any | None = None  # transformers' WeightConverter; None: the tensor as it is
    keys: dict[str, list[str]] = field(default_factory=dict[str, list[str]])  # the checkpoint's, by source pattern

    def convert(self, target: str, model: Any, tensors: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The parameters by name, in the model's shapes, from the tensors of each source pattern, as stored [...]."""
        if self.converter is None:
            return {target: next(iter(tensors.values()))[0]}
        converter = copy.deepcopy(self.converter)
        for pattern, values in tensors.items():
            for value in values:
                converter.add_tensor(target, target, pattern, value)
        converted = converter.convert(target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}

    @property
    def operations(self) -> list[str]:
        return [] if self.converter is None else [type(op).__name__ for op in self.converter.operations]

    def targets(self, target: str) -> Iterator[str]:
        """The parameters that its conversion makes, `target` being the first of them."""
        yield target
        patterns: list[str] = [] if self.converter is None else self.converter.target_patterns
        for pattern in patterns[1:]:
            yield target.replace(patterns[0], pattern, 1)


@dataclass
class Placement:
    """Where a checkpoint's tensors go."""

    sources: dict[str, Source]  # by parameter
    unused: list[str]  # tensors that the model has no place for
    lacking: list[str]  # parameters without a tensor
    wrapper: str = ""  # what was taken away from the names


def place(keys: Collection[str], model: Any) -> Placement:
    """The best placement of the tensors `keys`: as they are called, else without the names of wrappers."""
    placed = _place({key: key for key in keys}, model)
    if not placed.lacking:
        return placed
    for wrapper, names in _unwrapped(keys):
        inner = _place(names, model)
        if not inner.lacking and all(key.endswith(_HARMLESS) for key in inner.unused):
            inner.wrapper = wrapper
            return inner
    return placed


def rules(model: Any, *, mxfp4: bool = False) -> tuple[list[Any], list[Any]]:
    """transformers' renamings and converters for a model, anew: some keep what they have seen."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    mapping = get_model_conversion_mapping(model, hf_quantizer=_dequantizer() if mxfp4 else None) or []
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    return renamings, [entry for entry in mapping if isinstance(entry, WeightConverter)]


def find_target(name: str, model: Any, of: tuple[list[Any], list[Any]], state: dict[str, Any]) -> tuple[str, Any]:
    """The parameter of a tensor called `name` (perhaps none of `state`), and the source pattern that it matches."""
    from transformers.core_model_loading import rename_source_key  # pyright: ignore[reportUnknownVariableType]

    target, pattern = rename_source_key(name, *of, model.base_model_prefix, state)
    return (name, None) if target not in state and name in state else (target, pattern)


def _place(names: Mapping[str, str], model: Any) -> Placement:
    from transformers.core_model_loading import dot_natural_key

    of = rules(model, mxfp4=any(name.endswith("_blocks") for name in names.values()))
    of_pattern = {pattern: entry for entry in of[1] for pattern in entry.source_patterns}
    state = model.state_dict()
    sources: dict[str, Source] = {}
    unused: list[str] = []
    for key in sorted(names, key=lambda key: cast("list[Any]", dot_natural_key(names[key]))):
        target, pattern = find_target(names[key], model, of, state)
        if target not in state:
            unused.append(key)
            continue
        source = sources.setdefault(target, Source(None if pattern is None else of_pattern[pattern]))
        source.keys.setdefault(pattern or key, []).append(key)
    return Placement(sources, unused, _lacking(sources, model, state))


def _lacking(sources: Mapping[str, Source], model: Any, state: Mapping[str, Any]) -> list[str]:
    """The parameters that neither have a tensor nor are tied to one that has."""
    there = {name for target, source in sources.items() for name in source.targets(target)}
    return [name for name in state if name not in there and not there & tied_to(model, name)]


def tied_to(model: Any, name: str) -> set[str]:
    """The parameters that share their values with `name`, and itself."""
    tied = dict(model.all_tied_weights_keys)
    root = tied.get(name, name)
    return {root, name, *(target for target, source in tied.items() if source == root)}


def common_prefix(names: Collection[str]) -> list[str]:
    """The leading parts that all the names have in common."""
    split = [name.split(".")[:-1] for name in names]
    nothing: list[str] = []
    first, last = min(split, default=nothing), max(split, default=nothing)
    n = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:n]


def _unwrapped(keys: Collection[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Ways to call the tensors without wrappers, and what is taken away for each."""
    names = {key: ".".join(part for part in key.split(".") if part not in _INNER) for key in keys}
    inner = sorted({part for key in keys for part in key.split(".")} & _INNER)
    if inner and len(set(names.values())) == len(names):
        yield ", ".join(inner), names
    prefix: Sequence[str] = common_prefix(names.values())
    for n in range(1, len(prefix) + 1):
        begin = ".".join(prefix[:n]) + "."
        yield ", ".join([*inner, begin]), {key: name.removeprefix(begin) for key, name in names.items()}


def _dequantizer() -> Any:
    """transformers' quantizer that knows how MXFP4's blocks and scales become plain weights."""
    from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer
    from transformers.utils.quantization_config import Mxfp4Config

    return Mxfp4HfQuantizer(Mxfp4Config(dequantize=True), pre_quantized=True)
