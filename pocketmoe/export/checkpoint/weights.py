"""From the checkpoint's tensors to the model's: dense weights loaded, experts one at a time.

The rules (which checkpoint tensors make up which parameter, and how) are transformers' own conversion mapping, which
also covers both layouts of experts: one tensor per expert, or all experts of a layer fused.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketmoe.bundle.store import translate_write_errors
from pocketmoe.errors import BadInput, UnsupportedModel
from pocketmoe.export.checkpoint import config
from pocketmoe.export.checkpoint.checkpoint import Checkpoint
from pocketmoe.export.tensors import names, quantization
from pocketmoe.export.tensors.adapter import Changes, refuse_unmerged
from pocketmoe.export.tensors.names import Source
from pocketmoe.system.files import set_aside

if TYPE_CHECKING:
    import torch

    from pocketmoe.export.capture.adapters import MoeModule
    from pocketmoe.export.packed.grid import Form

_LAYOUT_OPERATIONS = ("MergeModulelist", "Concatenate", "Transpose", "Interleave")  # they move numbers, no more
_EXPERT_OPERATIONS = (*_LAYOUT_OPERATIONS, "Mxfp4Dequantize")


class Weights:
    """The tensors of a checkpoint under the names of a model's parameters, with an adapter merged in where given."""

    def __init__(self, checkpoint: Checkpoint, model: Any) -> None:
        """Raises BadInput, UnsupportedModel, by the tensors' names and dtypes alone, for what cannot be read."""
        self._checkpoint = checkpoint
        self._model = model
        refuse_unmerged(checkpoint.shards)
        placed = names.place(checkpoint.keys, model)
        self._sources = placed.sources
        self.unused = placed.unused  # checkpoint keys that the model has no place for
        self.wrapper = placed.wrapper
        self._check_dtypes()
        if placed.lacking:
            raise self.missing(placed.lacking[0])
        checkpoint.check_method()
        self._model_names = set(model.state_dict())
        self._forms: dict[tuple[str, int | None], Form | None] = {}
        self.moved: list[str] = []  # what `form_of` found packed, its groups' inputs in no row
        adapter = checkpoint.adapter
        self._changes = Changes(adapter, model, self._sources) if adapter is not None else None

    def _check_dtypes(self) -> None:
        """Raises UnsupportedModel for a parameter in floats whose tensors are none that can be read as such."""
        state = self._model.state_dict()
        for target, source in self._sources.items():
            if not state[target].is_floating_point():
                continue
            packed = "Mxfp4Dequantize" in source.operations
            for key in (key for keys in source.keys.values() for key in keys):
                dtype = self._checkpoint.dtype(key)
                if not packed:
                    self._checkpoint.check_floats(key)
                elif dtype != "U8":
                    raise quantization.refuse(
                        self._checkpoint.where(key), dtype, self._checkpoint.quantization, "no MXFP4"
                    )

    def load(self, target: str) -> dict[str, torch.Tensor]:
        """The parameter `target`, and those that its conversion makes along with it: float32, the model's shapes [...].

        Raises BadInput.
        """
        source = self._sources.get(target)
        if source is None:  # tied to what the checkpoint has, and no longer when an adapter changes one of them
            base = next(name for name in names.tied_to(self._model, target) if name in self._sources)
            loaded = {target: self._convert(base, self._read_all(self._sources[base]))[base]}
        else:
            loaded = self._convert(target, self._read_all(source))
        if self._changes is not None:
            loaded = {name: self._changes.apply(name, tensor) for name, tensor in loaded.items()}
        return loaded

    def _read_all(self, source: Source) -> dict[str, list[torch.Tensor]]:
        return {pattern: [self._read(key) for key in keys] for pattern, keys in source.keys.items()}

    def _read(self, key: str, expert: int | None = None) -> torch.Tensor:
        tensor = self._checkpoint.read(key, expert)
        if self._changes is None or key in self._model_names:
            return tensor
        return self._changes.apply(key, tensor, expert)

    def _convert(self, target: str, tensors: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        try:
            return self._sources[target].convert(target, self._model, tensors)
        except Exception as error:
            raise BadInput(
                f"{self._checkpoint.root}: the tensors of {target!r} do not fit together ({error})",
                "Use the config.json that belongs to these weights, or download the checkpoint again.",
            ) from error

    def targets(self) -> list[str]:
        """The parameters to load: those that the checkpoint has, and what is tied to them but changed apart."""
        apart = set[str]()
        for name in self._changes.parameters if self._changes is not None else ():
            apart |= names.tied_to(self._model, name)
        return [*self._sources, *sorted(apart & self._model_names - set(self._sources))]

    def load_expert(self, moe: MoeModule, tensor: str, expert: int) -> torch.Tensor:
        """One expert's tensor, float32, in the shape `moe.shapes[tensor]`. Raises BadInput.

        Of a parameter [experts, ...] that stacks them only this expert's bytes are read.
        """
        target, stacked = moe.parameter(tensor, expert)
        return self._load_slice(target, expert, moe.n_experts) if stacked else self.load(target)[target]

    def _load_slice(self, target: str, expert: int, n_experts: int) -> torch.Tensor:
        source = self._sources[target]
        tensors = {pattern: [self._expert_tensor(keys, expert, n_experts)] for pattern, keys in source.keys.items()}
        converted = self._convert(target, tensors)[target][0]
        if self._changes is None:
            return converted
        added = self._changes.of_expert(target, expert)
        return self._changes.apply(target, converted if added is None else converted + added, expert)

    def _expert_tensor(self, keys: Sequence[str], expert: int, n_experts: int) -> torch.Tensor:
        if len(keys) == n_experts:  # one tensor per expert, in natural order
            return self._read(keys[expert])
        return self._read(keys[0], expert)

    def packed_parameters(self, experts: Collection[str]) -> list[str]:
        """The matrices that are packed, all of one form, but for those of the experts' parameters."""
        state = self._model.state_dict()
        names = (name for name in self._sources if name not in experts and state[name].ndim == 2)
        return [name for name in names if self.form_of(name) is not None]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter."""
        return tuple(self._model.state_dict()[name].shape)

    def form_of(self, target: str, expert: int | None = None, n_experts: int = 0) -> Form | None:
        """What stands for a parameter, or for one expert's slice of it; None for plain weights, and several forms."""
        place = target, expert
        if place not in self._forms:
            self._forms[place] = self._find_form(target, expert, n_experts)
        return self._forms[place]

    def _find_form(self, target: str, expert: int | None, n_experts: int) -> Form | None:
        source = self._sources.get(target)
        if source is None or self._changes is not None or not set(source.operations) <= {*_LAYOUT_OPERATIONS}:
            return None
        keys = [key for of in self._keys_of(source, expert, n_experts).values() for key in of]
        packed = [self._checkpoint.packed[key] for key in keys if key in self._checkpoint.packed]
        forms = {weight.form for weight in packed}
        if len(packed) < len(keys) or len(forms) != 1:
            return None
        if not all(weight.keepable(self._checkpoint.shards.read) for weight in packed):
            self.moved.append(target if expert is None else f"{target} (expert {expert})")
            return None
        return forms.pop()

    def _keys_of(self, source: Source, expert: int | None, n_experts: int) -> dict[str, list[str]]:
        """The tensors of a parameter, or of one expert's slice of it, by pattern."""
        if expert is None:
            return source.keys
        return {pattern: [keys[expert] if len(keys) == n_experts else keys[0]] for pattern, keys in source.keys.items()}

    def planes(self, target: str, expert: int | None = None, n_experts: int = 0) -> dict[str, torch.Tensor]:
        """Codes, scales and zero points (`Grid.planes`) of a parameter [..., N, K] that `form_of` knows."""
        source, read = self._sources[target], self._checkpoint.shards.read
        found = {
            pattern: [self._checkpoint.packed[key].make(read).planes() for key in keys]
            for pattern, keys in self._keys_of(source, expert, n_experts).items()
        }
        planes = next(iter(found.values()))[0]
        converted = {
            plane: self._convert(target, {pattern: [each[plane] for each in of] for pattern, of in found.items()})
            for plane in planes
        }
        return {plane: of[target] if expert is None else of[target][0] for plane, of in converted.items()}

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
        """The error for a parameter without a tensor: what is there in its place, as far as that can be told."""
        shards, root = self._checkpoint.shards, self._checkpoint.root
        packed = quantization.packed(self.unused)
        if packed is not None:
            key, method = packed
            return quantization.refuse(
                f"{root}: {target!r} is missing, and {key!r}", shards.dtype(key), self._checkpoint.quantization, method
            )
        missing = f"{root}: tensor {target!r} is missing"
        prefix = ".".join(names.common_prefix(shards.keys))
        if prefix and not target.startswith(f"{prefix}."):
            return BadInput(
                f"{missing}; the names of all {len(shards.keys)} tensors begin with '{prefix}.'",
                "Save the model without what it was wrapped in, under transformers' names (save_pretrained).",
            )
        return BadInput(missing, "Download the checkpoint again.")


def _after_merge(source: Source) -> list[Any]:
    operations: list[Any] = [] if source.converter is None else source.converter.operations
    return [op for op in operations if type(op).__name__ != "MergeModulelist"]


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
    from pocketmoe.export.capture.custom_op import find_experts

    path = checkpoint.root / config.FILE
    model = config.make_model(path, checkpoint.settings, checkpoint.config, checkpoint.ran_code)
    experts = find_experts(model)
    if not experts:
        raise UnsupportedModel(
            f"{checkpoint.root}: {type(model).__name__} has no routed experts that the export knows of",
            "Choose a Mixture-of-Experts model, or register the form of its experts (docs/OWN_MODEL.md).",
        )
    weights = Weights(checkpoint, model)
    expert_names = {name for moe in experts.values() for name in moe.parameters()}
    for moe in experts.values():
        for tensor in moe.form.weights:
            weights.check_experts(moe, tensor)
    _load_dense(checkpoint, model, weights, expert_names, scratch)
    return model, weights, experts


def release(model: Any, experts: Sequence[MoeModule]) -> None:
    """Let go of the weights outside the experts' modules; the modules, their settings and shapes stay."""
    kept = {module for moe in experts for module in moe.module.modules()}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and module not in kept:
                module._parameters[name] = parameter.to("meta")


def _mapped(tensor: torch.Tensor, directory: Path) -> torch.Tensor:
    """A copy of the tensor in a mapped file without a name, whose pages the system can drop from memory."""
    import torch

    if not tensor.numel():
        return tensor
    with translate_write_errors(directory), tempfile.TemporaryFile(dir=directory) as file:
        set_aside(file.fileno(), tensor.nbytes)  # else a full disk would be death by SIGBUS
        pages = mmap.mmap(file.fileno(), tensor.nbytes)  # the map keeps the file alive
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

    from pocketmoe.export.capture.capture import quiet

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
    missing = sorted(name for name in set(state) - loaded - expert_names if not names.tied_to(model, name) & loaded)
    if missing:
        raise weights.missing(missing[0])
    for name in expert_names:
        model.get_parameter(name)._is_hf_initialized = True
    for name, buffer in model.named_non_persistent_buffers():
        _put(model, name, torch.empty_like(buffer, device="cpu"), initialized=False)
    model.initialize_weights()  # computes non-persistent buffers; leaves what is marked as initialized
    with quiet():  # it warns of two that differ, which then stay apart
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
