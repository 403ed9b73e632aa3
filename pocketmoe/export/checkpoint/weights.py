"""From the checkpoint's tensors to the model's: dense weights loaded, experts one at a time.

The rules (which checkpoint tensors make up which parameter, and how) are transformers' own conversion mapping, which
also covers both layouts of experts: one tensor per expert, or all experts of a layer fused.
"""

from __future__ import annotations

import copy
import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketmoe.bundle.store import translate_write_errors
from pocketmoe.errors import BadInput, UnsupportedModel
from pocketmoe.export.checkpoint.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

    from pocketmoe.export.capture.adapters import MoeModule

_EXPERT_OPERATIONS = ("MergeModulelist", "Concatenate", "Transpose", "Interleave", "Mxfp4Dequantize")


@dataclass
class Source:
    """The checkpoint tensors that one conversion turns into one or more parameters."""

    converter: Any | None = None  # transformers' WeightConverter; None: the tensor as it is
    keys: dict[str, list[str]] = field(default_factory=dict)  # source pattern -> checkpoint keys in order

    def convert(self, target: str, model: Any, tensors: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The parameters by name, from the tensors of each source pattern."""
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


class Weights:
    """The tensors of a checkpoint under the names of a model's parameters."""

    def __init__(self, checkpoint: Checkpoint, model: Any) -> None:
        self._checkpoint = checkpoint
        self._model = model
        self._sources: dict[str, Source] = {}
        self.unused: list[str] = []  # checkpoint keys that the model has no place for
        self._plan()

    def _plan(self) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        dequantizer = _dequantizer(self._checkpoint.quantization)
        mapping = get_model_conversion_mapping(self._model, hf_quantizer=dequantizer) or []
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        of_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        state, prefix = self._model.state_dict(), self._model.base_model_prefix
        for key in sorted(self._checkpoint.keys, key=dot_natural_key):
            target, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if target not in state and key in state:
                target, pattern = key, None
            if target not in state:
                self.unused.append(key)
                continue
            converter = None if pattern is None else of_pattern[pattern]
            source = self._sources.setdefault(target, Source(converter))
            source.keys.setdefault(pattern or key, []).append(key)

    def load(self, target: str) -> dict[str, torch.Tensor]:
        """The parameter `target` (and those that its conversion makes along with it), float32. Raises BadInput."""
        source = self._sources[target]
        tensors = {p: [self._checkpoint.read(key) for key in keys] for p, keys in source.keys.items()}
        return self._convert(target, tensors)

    def _convert(self, target: str, tensors: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        try:
            return self._sources[target].convert(target, self._model, tensors)
        except Exception as error:
            raise BadInput(
                f"{self._checkpoint.root}: the tensors of {target!r} do not fit together ({error})",
                "Use the config.json that belongs to these weights, or download the checkpoint again.",
            ) from error

    def targets(self) -> list[str]:
        return list(self._sources)

    def load_expert(self, moe: MoeModule, tensor: str, expert: int) -> torch.Tensor:
        """One expert's tensor, as the model's parameter holds it, float32, reading only its bytes."""
        target, stacked = moe.parameter(tensor, expert)
        return self._load_slice(target, expert, moe.n_experts) if stacked else self.load(target)[target]

    def _load_slice(self, target: str, expert: int, n_experts: int) -> torch.Tensor:
        source = self._sources[target]
        tensors = {pattern: [self._expert_tensor(keys, expert, n_experts)] for pattern, keys in source.keys.items()}
        return self._convert(target, tensors)[target][0]

    def _expert_tensor(self, keys: Sequence[str], expert: int, n_experts: int) -> torch.Tensor:
        if len(keys) == n_experts:  # one tensor per expert, in natural order
            return self._checkpoint.read(keys[expert])
        return self._checkpoint.read(keys[0], expert)

    def check_experts(self, moe: MoeModule, tensor: str) -> None:
        """Raises BadInput, UnsupportedModel unless a tensor of a module's experts can be read one expert at a time."""
        target, stacked = moe.parameter(tensor, 0)
        if stacked:
            self._check_slices(target, moe.n_experts)
        else:
            missing = [t for t in (moe.parameter(tensor, e)[0] for e in range(moe.n_experts)) if t not in self._sources]
            if missing:
                raise self.missing(missing[0])
        found = tuple(self.load_expert(moe, tensor, 0).shape)
        if found != moe.shapes[tensor]:
            raise self._wrong_shape(f"{target} (expert 0)", found, moe.shapes[tensor])

    def _check_slices(self, target: str, n_experts: int) -> None:
        source = self._sources.get(target)
        if source is None:
            raise self.missing(target)
        unknown = sorted(set(source.operations) - set(_EXPERT_OPERATIONS))
        if unknown or any(_mixes_experts(op) for op in _after_merge(source)):
            raise UnsupportedModel(
                f"{self._checkpoint.root}: the experts {target!r} are converted by {unknown or source.operations}",
                "This layout of experts is not supported yet.",
            )
        per_expert = "MergeModulelist" in source.operations
        wanted = set(source.converter.source_patterns) if source.converter is not None else set(source.keys)
        for pattern in wanted:
            keys = source.keys.get(pattern, [])
            n_found = len(keys) if per_expert else (self._checkpoint.shape(keys[0]) or (0,))[0] if keys else 0
            if n_found != n_experts:
                raise BadInput(
                    f"{self._checkpoint.root}: {target!r} needs {n_experts} experts, {pattern!r} has {n_found}",
                    "A shard or a tensor is missing: download the checkpoint again.",
                )
            odd = [key for key in keys if self._checkpoint.shape(key) != self._checkpoint.shape(keys[0])]
            if odd:
                raise self._wrong_shape(odd[0], self._checkpoint.shape(odd[0]), self._checkpoint.shape(keys[0]))

    def _wrong_shape(self, name: str, found: Sequence[int], wanted: Sequence[int]) -> BadInput:
        return BadInput(
            f"{self._checkpoint.root}: tensor {name!r} has shape {list(found)}, {list(wanted)} is needed",
            "Use the config.json that belongs to these weights.",
        )

    def missing(self, target: str) -> BadInput:
        return BadInput(f"{self._checkpoint.root}: tensor {target!r} is missing", "Download the checkpoint again.")


def _after_merge(source: Source) -> list[Any]:
    operations = [] if source.converter is None else source.converter.operations
    return [op for op in operations if type(op).__name__ != "MergeModulelist"]


def _dequantizer(method: str | None) -> Any | None:
    """transformers' quantizer that knows how a quantized checkpoint becomes a plain one."""
    if method != "mxfp4":  # eight-bit floats are plain numbers by the time they are read
        return None
    from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer
    from transformers.utils.quantization_config import Mxfp4Config

    return Mxfp4HfQuantizer(Mxfp4Config(dequantize=True), pre_quantized=True)


def _mixes_experts(operation: Any) -> bool:
    """Whether an operation on [n_experts, ...] does not work on each expert apart."""
    axes = [getattr(operation, name, 1) for name in ("dim", "dim0", "dim1")]
    return any(axis in (0, -3) for axis in axes) or getattr(operation, "check_dims", False)


def load_model(checkpoint: Checkpoint, scratch: Path | None = None) -> tuple[Any, Weights, dict[str, MoeModule]]:
    """The model in float32 with its experts' weights left on `meta`; where all weights come from; its experts modules.

    `scratch`: a directory for a file that the other weights are mapped from, so that a small machine need not hold
    them; the file has no name, and is gone when the weights are. None: in memory.
    Raises UnsupportedModel when the model has no experts, BadInput when tensors are missing or have a wrong shape.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from pocketmoe.export.capture.custom_op import find_experts

    config = checkpoint.config
    if config.is_encoder_decoder:
        raise UnsupportedModel(
            f"{checkpoint.root}: {config.model_type} is an encoder-decoder; a bundle holds one graph that continues a "
            "text, and has no place for an encoder that runs before it",
            "Choose a decoder-only MoE language model.",
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=checkpoint.ran_code
            ).eval()
    except (ValueError, KeyError, ImportError) as error:
        raise UnsupportedModel(
            f"{checkpoint.root}: transformers has no language model for model_type {config.model_type!r}",
            "Choose a decoder-only MoE language model.",
        ) from error
    experts = find_experts(model)
    if not experts:
        raise UnsupportedModel(
            f"{checkpoint.root}: {type(model).__name__} has no routed experts that the export knows of",
            "Choose a Mixture-of-Experts model, or register the form of its experts (docs/OWN_MODEL.md).",
        )
    weights = Weights(checkpoint, model)
    expert_names = {name for moe in experts.values() for name in moe.parameters()}
    _load_dense(checkpoint, model, weights, expert_names, scratch)
    for moe in experts.values():
        for tensor in moe.form.weights:
            weights.check_experts(moe, tensor)
    return model, weights, experts


def release(model: Any, experts: Sequence[MoeModule]) -> None:
    """Let go of the weights outside the experts' modules; the modules, their settings and shapes stay."""
    kept = {module for moe in experts for module in moe.module.modules()}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and module not in kept:
                module._parameters[name] = parameter.to("meta")


def _mapped(tensor: torch.Tensor, directory: Path) -> torch.Tensor:
    """The tensor's twin in a file without a name: the system drops from memory what is not in use."""
    import torch

    if not tensor.numel():
        return tensor
    with translate_write_errors(directory), tempfile.TemporaryFile(dir=directory) as file:
        os.posix_fallocate(file.fileno(), 0, tensor.nbytes)  # else a full disk would be death by SIGBUS
        pages = mmap.mmap(file.fileno(), tensor.nbytes)  # keeps the file
    return torch.frombuffer(pages, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


def _load_dense(
    checkpoint: Checkpoint,
    model: Any,
    weights: Weights,
    expert_names: set[str],
    scratch: Path | None,
) -> None:
    """Fill everything but the experts, check that nothing is missing, and compute what checkpoints do not hold."""
    import torch

    state = model.state_dict()
    loaded: set[str] = set()
    for target in weights.targets():
        if target in expert_names or target in loaded:
            continue
        for name, tensor in weights.load(target).items():
            if name in state and tuple(tensor.shape) != tuple(state[name].shape):
                raise BadInput(
                    f"{checkpoint.root}: tensor {name!r} has shape {list(tensor.shape)}, "
                    f"config.json asks for {list(state[name].shape)}",
                    "Use the config.json that belongs to these weights.",
                )
            _put(model, name, tensor if scratch is None else _mapped(tensor, scratch))
            loaded.add(name)
    tied = set(model.all_tied_weights_keys)
    missing = sorted(set(state) - loaded - expert_names - tied)
    if missing:
        raise weights.missing(missing[0])
    for name in expert_names:
        model.get_parameter(name)._is_hf_initialized = True
    for name, buffer in model.named_non_persistent_buffers():
        _put(model, name, torch.empty_like(buffer, device="cpu"), initialized=False)
    model.initialize_weights()  # computes non-persistent buffers; leaves what is marked as initialized
    model.tie_weights(missing_keys=set(state) - loaded - expert_names, recompute_mapping=False)
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta and name not in expert_names]
    if left:
        raise weights.missing(left[0])


def _put(model: Any, name: str, tensor: torch.Tensor, *, initialized: bool = True) -> None:
    """Set a parameter or buffer by name."""
    import torch

    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        tensor = module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
    tensor._is_hf_initialized = initialized  # type: ignore[attr-defined]
