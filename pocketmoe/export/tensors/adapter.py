"""LoRA adapters, as peft saves them, merged into weights while these are read: W + scaling * (B @ A).

The arithmetic is peft's `merge` in float32 (tuners/lora/layer.py): scaling is alpha / r, or alpha / sqrt(r) (rsLoRA);
experts that are stacked in one parameter have their A's and B's side by side (`ParamWrapper`). Adapters that were
trained with one module per expert are applied under those names, before transformers' conversion stacks them.
What changes weights in another way (DoRA, IA3, ...) is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketmoe.errors import BadInput, UnsupportedModel
from pocketmoe.export.tensors import names
from pocketmoe.export.tensors.directory import Directory
from pocketmoe.export.tensors.shards import FLOATS, SINGLE, Shards
from pocketmoe.jsonfile import is_array, parse_object

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_MERGE = "Merge the adapter first (peft: merge_and_unload, then save_pretrained)."
_ITS_BASE = "Name the base model that the adapter was trained on."
_UNMERGED = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|base_layer|lora_magnitude_vector)(\.|$)")
_PART = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(\.default)?(?P<leaf>\.weight|\.bias)?")
_PLAIN_INITS = (True, False, "true", "false", "gaussian", "eva", "orthogonal")  # those that leave the base as it is
_KNOWN = {  # settings that are applied here, or that only training goes by
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "target_parameters", "task_type", "use_rslora", "velora_config",
}  # fmt: skip


def refuse_adapter(directory: Directory, *, is_chosen: bool) -> None:
    """Raises BadInput for a directory with an adapter, alone or beside a whole model: it must be said what is meant.

    `is_chosen`: it was said which adapter to merge; the one beside the model is that, or left alone.
    """
    if directory.file(CONFIG) is None:
        return
    root = directory.root
    if directory.file("config.json") is not None and _has_model(root):
        if is_chosen:
            return
        raise BadInput(
            f"{root} holds a whole model and an adapter ({CONFIG})",
            f"To export the model with the adapter merged in: --adapter {root}. Without it: move {CONFIG} away.",
        )
    base = _read_settings(directory).get("base_model_name_or_path")
    name = base if isinstance(base, str) and base else "BASE"
    raise BadInput(
        f"{root} is an adapter of {name}, not a whole model",
        f"Export its base model with it: pocketmoe export {name} --adapter {root}.",
    )


def _has_model(root: Path) -> bool:
    return (root / SINGLE).exists() or any(root.glob("*.safetensors.index.json"))


def refuse_unmerged(keys: Iterable[str]) -> None:
    """Raises UnsupportedModel for a model whose tensors hold an adapter's beside those that it changes."""
    found = next((key for key in keys if _UNMERGED.search(key)), None)
    if found is not None:
        raise UnsupportedModel(f"the weights hold an adapter that is not merged into them ({found!r})", _MERGE)


def _read_settings(directory: Directory) -> dict[str, Any]:
    return parse_object(directory.read(CONFIG) or b"", directory.root / CONFIG, "Download the adapter again.")


@dataclass(frozen=True)
class LoRA:
    """What is added to one parameter. `n_experts`: of a parameter [experts, ...]; its matrices may lie transposed."""

    a: torch.Tensor  # float32 [r, in], of experts [experts * r, in]; of an embedding [r, tokens]
    b: torch.Tensor  # float32 [out, r], of experts [out, r * experts]; of an embedding [width, r]
    scaling: float
    n_experts: int = 1
    turned: bool = False  # the parameter is [in, out]

    def delta(self, expert: int | None = None) -> torch.Tensor:
        """scaling * B A, float32 [out, in], [in, out] where `turned`; of several experts [experts, ...], or of one."""
        import torch

        if self.n_experts > 1 and expert is None:
            return torch.stack([self.delta(e) for e in range(self.n_experts)])
        a = self.a.reshape(self.n_experts, -1, self.a.shape[-1])[expert or 0]
        b = self.b.reshape(self.b.shape[0], -1, self.n_experts)[:, :, expert or 0]
        delta = (b @ a) * self.scaling
        return delta.T if self.turned else delta


class Adapter:
    """An adapter's directory: its settings, and its tensors by the names of what they change."""

    def __init__(self, root: Path) -> None:
        """Raises BadInput, DamagedFile or UnsupportedModel for what is no LoRA adapter that can be merged."""
        self.directory = Directory(root)
        self.root, self.name = root, root.resolve().name
        if self.directory.file(CONFIG) is None:
            raise BadInput(f"{root} has no {CONFIG}", "Name the directory of an adapter that peft saved.")
        self.settings = _read_settings(self.directory)
        self._check_settings()
        if self.directory.file(WEIGHTS) is None:
            raise BadInput(f"{root} has no {WEIGHTS}", "Save the adapter as safetensors (peft: save_pretrained).")
        self._shards = Shards(self.directory, WEIGHTS)
        self.pairs: dict[str, dict[str, str]] = {}  # module -> side (A, B, bias, embedding_A, embedding_B) -> tensor
        self.whole: dict[str, str] = {}  # parameter -> tensor that takes its place
        for key in self._shards.keys:
            self._sort(key)

    @property
    def files(self) -> list[Path]:
        return [self.root / CONFIG, self.root / WEIGHTS]

    @property
    def note(self) -> str:
        """For the bundle's notes."""
        changed = len(self.pairs) + len(self.whole)
        return f"the adapter {self.name} (LoRA, {changed} modules) is merged into the weights"

    def error(self, what: str, remedy: str = _ITS_BASE) -> BadInput:
        return BadInput(f"{self.root}: {what}", remedy)

    def _check_settings(self) -> None:
        settings, where = self.settings, f"{self.root / CONFIG}:"
        kind = settings.get("peft_type")
        if kind != "LORA":
            raise UnsupportedModel(f"{where} peft_type {kind!r} is not supported, only LORA", _MERGE)
        odd = sorted(name for name, value in settings.items() if name not in _KNOWN and value)
        if odd:
            raise UnsupportedModel(f"{where} LoRA with {odd[0]} is not supported", _MERGE)
        init = settings.get("init_lora_weights", True)
        if init not in _PLAIN_INITS:
            raise UnsupportedModel(f"{where} init_lora_weights {str(init)[:40]!r} changes the base model too", _MERGE)
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(settings.get(name) or {}, dict):
                raise UnsupportedModel(f"{where} {name} is no mapping", "Download the adapter again.")

    def _sort(self, key: str) -> None:
        """Find out what a tensor is for, by its name."""
        if self._shards.dtype(key) not in FLOATS:
            raise self.error(f"tensor {key!r} is stored as {self._shards.dtype(key)}", "Save the adapter in floats.")
        name = key.removeprefix("base_model.model.")
        match = _PART.fullmatch(name)
        if match is not None:
            side = "bias" if match["leaf"] == ".bias" else (match["kind"] or "") + match["side"]
            self.pairs.setdefault(match["module"], {})[side] = key
        elif "lora_" in name or "token_adapter" in name or "." not in name:
            raise self.error(f"tensor {key!r} is of a kind that is not supported", _MERGE)
        else:
            self.whole[re.sub(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)", "", name)] = key

    def read(self, key: str) -> torch.Tensor:
        """A tensor of the adapter, float32 in its stored shape [...]. Raises BadInput for what is no number."""
        tensor = self._shards.read(key).float()
        if not tensor.isfinite().all():
            raise self.error(f"tensor {key!r} holds NaN or infinite values", "Use an undamaged adapter.")
        return tensor

    def lora(self, module: str, pattern_key: str, n_experts: int = 1, turned: bool = False) -> LoRA:
        """What is added to a module's weight. `pattern_key`: what rank_pattern and alpha_pattern are matched to."""
        sides = self.pairs[module]
        kind = "embedding_" if "embedding_A" in sides else ""
        if f"{kind}A" not in sides or f"{kind}B" not in sides:
            raise self.error(f"{module!r} has but one of lora_A and lora_B", "Download the adapter again.")
        a, b = self.read(sides[f"{kind}A"]), self.read(sides[f"{kind}B"])
        r = self._setting("r", "rank_pattern", 8, pattern_key)
        if a.ndim != 2 or b.ndim != 2 or len(a) != r * n_experts or b.shape[1] != r * n_experts:
            raise self.error(
                f"{module!r} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, not of rank {r:g}"
                + (f" for {n_experts} experts" if n_experts > 1 else "")
            )
        return LoRA(a, b, self.scaling(pattern_key), n_experts, turned or bool(kind))

    def scaling(self, pattern_key: str) -> float:
        r = self._setting("r", "rank_pattern", 8, pattern_key)
        alpha = self._setting("lora_alpha", "alpha_pattern", 8, pattern_key)
        return alpha / math.sqrt(r) if self.settings.get("use_rslora") else alpha / r

    def _setting(self, name: str, patterns: str, default: float, pattern_key: str) -> float:
        """A number of the settings, or of the first pattern that matches, as peft's `get_pattern_key` does."""
        value = self.settings.get(name, default)
        own_values: dict[str, Any] = self.settings.get(patterns) or {}
        for pattern, own in own_values.items():
            if _matches(pattern, pattern_key):
                value = own
                break
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
            raise self.error(f"{CONFIG} has no usable {name} for {pattern_key!r}", "Download the adapter again.")
        return value


def _matches(pattern: str, key: str) -> bool:
    if len(pattern) > 500:
        return False
    try:
        return re.match(rf"(.*\.)?({pattern})$", key) is not None
    except re.error:
        return False


class Changes:
    """What an adapter does to each parameter of a model, or to each tensor of the checkpoint where it names these."""

    def __init__(self, adapter: Adapter, model: Any, sources: Mapping[str, names.Source]) -> None:
        """Raises BadInput when a tensor of the adapter has no place in the model."""
        self._adapter, self._model = adapter, model
        self._state = model.state_dict()
        self._keys = {key for source in sources.values() for keys in source.keys.values() for key in keys}
        self._rules = names.rules(model)
        self._added: dict[str, list[LoRA]] = {}  # by parameter, or by tensor of the checkpoint
        self._biases: dict[str, torch.Tensor] = {}
        self._whole: dict[str, str] = {}
        self._of_experts: dict[str, dict[int, dict[str, LoRA]]] = {}  # stacked parameter -> expert -> source pattern
        for module in adapter.pairs:
            self._find(module)
        for name, key in adapter.whole.items():
            self._whole[self._place_of(name)] = key

    @property
    def parameters(self) -> set[str]:
        """The parameters that it changes under their own names."""
        return {name for name in (*self._added, *self._whole, *self._biases) if name in self._state}

    def _find(self, module: str) -> None:
        """Find the parameter that the pair of a module changes."""
        plain = re.sub(r"\.base_layer(?=\.|$)", "", module)
        parameter = self._wrapped(module, plain)
        if parameter is not None:
            n_experts, turned = self._stack(plain, parameter)
            lora = self._adapter.lora(module, parameter, n_experts, turned)
            self._added.setdefault(parameter, []).append(lora)
            return
        lora = self._adapter.lora(module, plain)
        if "bias" in self._adapter.pairs[module]:
            bias = self._adapter.read(self._adapter.pairs[module]["bias"]) * self._adapter.scaling(plain)
            self._biases[self._place_of(f"{plain}.bias")] = bias
        name = f"{plain}.weight"
        if name in self._state or name in self._keys:
            self._added.setdefault(name, []).append(lora)
            return
        target, pattern = names.find_target(name, self._model, self._rules, self._state)
        number = re.search(r"\.experts\.(\d+)\.", name)
        if target in self._state and pattern is None:
            self._added.setdefault(target, []).append(lora)
        elif target in self._state and number is not None:
            self._of_experts.setdefault(target, {}).setdefault(int(number[1]), {})[pattern] = lora
        else:
            raise self._adapter.error(f"the model has no module {plain!r}")

    def _wrapped(self, module: str, plain: str) -> str | None:
        """The parameter behind a module's pair, where `target_parameters` names it.

        peft wraps a module once for each of its parameters that are named, in their order, the last one outermost; what
        is inside is called base_layer.
        """
        targets = self._adapter.settings.get("target_parameters")
        owner = dict(self._model.named_modules()).get(plain)
        if owner is None or not is_array(targets) or not targets:
            return None
        named = [
            name
            for name in (f"{plain}.{leaf}" for leaf, _ in owner.named_parameters(recurse=False))
            if any(isinstance(t, str) and (name == t or name.endswith(f".{t}")) for t in targets)
        ]
        depth = module.count(".base_layer")
        return named[-1 - depth] if depth < len(named) else None

    def _stack(self, plain: str, parameter: str) -> tuple[int, bool]:
        """How many experts a parameter stacks, and whether their matrices are [in, out]."""
        shape = self._state[parameter].shape
        if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] == 1):
            raise self._adapter.error(f"{parameter!r} has shape {list(shape)}, which is not supported", _MERGE)
        turned = len(shape) == 3 and bool(getattr(self._model.get_submodule(plain), "is_transposed", False))
        return (shape[0] if len(shape) == 3 else 1), turned

    def _place_of(self, name: str) -> str:
        if name in self._state or name in self._keys:
            return name
        target, pattern = names.find_target(name, self._model, self._rules, self._state)
        if target not in self._state or pattern is not None:
            raise self._adapter.error(f"the model has no parameter {name!r}")
        return target

    def apply(self, name: str, tensor: torch.Tensor, expert: int | None = None) -> torch.Tensor:
        """`tensor` with what the adapter changes of it: float32 [...], a parameter, a checkpoint's tensor, or a slice.

        `expert`: whose slice of a stacked parameter it is. Raises BadInput where the shapes differ.
        """
        if name in self._whole:
            tensor = self._same_shape(name, tensor, self._adapter.read(self._whole[name]))
        for lora in self._added.get(name, ()):
            tensor = tensor + self._same_shape(name, tensor, lora.delta(expert if lora.n_experts > 1 else None))
        if name in self._biases:
            tensor = tensor + self._same_shape(name, tensor, self._biases[name])
        return tensor

    def of_expert(self, target: str, expert: int) -> torch.Tensor | None:
        """What is added to one expert's slice [...] of a parameter [experts, ...], float32; None where nothing is.

        For parameters that the checkpoint has in parts, which transformers stacks while it loads.
        """
        import torch

        loras = self._of_experts.get(target, {}).get(expert)
        if not loras:
            return None
        deltas = {pattern: lora.delta() for pattern, lora in loras.items()}
        converter = next(entry for entry in self._rules[1] if set(deltas) <= set(entry.source_patterns))
        some = next(iter(deltas.values()))
        tensors = {pattern: [deltas.get(pattern, torch.zeros_like(some))] for pattern in converter.source_patterns}
        return names.Source(converter).convert(target, self._model, tensors)[target][0]

    def _same_shape(self, name: str, tensor: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        if tensor.shape != change.shape:
            raise self._adapter.error(f"it changes {name!r}, {list(tensor.shape)}, by {list(change.shape)}")
        return change
