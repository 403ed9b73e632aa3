"""config.json as it was published, and what of it decides the answers: the configuration that a capture is made from.

Training leaves settings behind that decide what a forward pass returns beside the logits, or what only training does.
transformers' logits do not depend on them, but a capture would: these are dropped by name (`for_inference`). All other
settings go to transformers as they are, and what it cannot use is refused by the setting's name.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial, reduce
from pathlib import Path
from typing import Any, TypeVar, cast

from pocketmoe import jsonfile
from pocketmoe.errors import BadInput, PocketMoEError, UnsupportedModel
from pocketmoe.jsonfile import is_array, is_object

_T = TypeVar("_T")
Place = tuple[str, ...]  # of a setting: its name, after that of the configuration that it is nested in

FILE = "config.json"
# what else a forward pass returns, and how it keeps its cache: a capture returns logits and states
_RETURNED = (
    "output_attentions", "output_hidden_states", "output_router_logits", "output_scores", "return_dict",
    "return_dict_in_generate", "use_return_dict", "use_cache", "tie_last_hidden_states",
)  # fmt: skip
# how a forward pass is computed elsewhere: in which type, by which kernels, in how many pieces
_COMPUTED = (
    "dtype", "torch_dtype", "use_bfloat16", "torchscript", "pretraining_tp", "chunk_size_feed_forward",
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset",
    "experts_implementation", "_experts_implementation", "_experts_implementation_internal",
)  # fmt: skip
# what only training, its losses, its initial weights or another head than the language model's read. Jitter is not
# among them: PhiMoE's router reads router_jitter_noise when it answers too
_TRAINED = (
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "router_aux_loss_coef", "aux_loss_alpha",
    "aux_loss_coef", "router_z_loss_coef", "seq_aux", "initializer_range", "architectures", "transformers_version",
    "problem_type", "finetuning_task", "task_specific_params", "id2label", "label2id", "num_labels",
)  # fmt: skip
NEUTRAL = frozenset({*_RETURNED, *_COMPUTED, *_TRAINED})

_COUNTS = re.compile(r"layer|depth|expert|head|group|block|replace|rank|top_?k|per_tok|step")
_BUILT = re.compile(r"(layers?|depth|blocks?)$")
_MOST = (1 << 31) - 1  # of any size
_MOST_COUNTED = 1 << 16
_MOST_BUILT = 2000  # of what a model is built from one by one, a millisecond or more each
_LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_WIDTHS = ("vocab_size", "hidden_size", "num_attention_heads", "num_experts_per_tok", "moe_topk")
_AT_LEAST_ONE = (*_WIDTHS, "max_position_embeddings", *_LAYERS)
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")
_MOST_SUSPECTS = 400
_OWN = f"Correct it, or use the {FILE} that belongs to these weights."


def read_settings(root: Path) -> dict[str, Any]:
    """config.json of a checkpoint's directory, with the name of its model type. Raises BadInput or DamagedFile."""
    if not root.is_dir():
        raise BadInput(f"{root} is not a directory", f"Name a directory with {FILE} and *.safetensors.")
    path = root / FILE
    if not path.exists():
        raise BadInput(f"{root} has no {FILE}", "Name the directory of a checkpoint in the Hugging Face layout.")
    return read_file(path)


def read_file(path: Path) -> dict[str, Any]:
    """The same of the file itself. Raises BadInput or DamagedFile."""
    settings = _with_special_floats(jsonfile.read_object(path))
    model_type = settings.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        found = "names no model_type" if model_type is None else f"has 'model_type' {_shown(model_type)}"
        raise UnsupportedModel(f"{path} {found}", "Name a checkpoint that transformers can read.")
    return settings


def for_inference(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those that transformers' logits do not depend on, in nested configurations too."""
    return {
        name: for_inference(value) if is_object(value) else value
        for name, value in settings.items()
        if name not in NEUTRAL
    }


def check_sizes(path: Path, settings: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]] | None = None) -> None:
    """Raises BadInput for a size that no model has, or that the tensors (names and shapes) contradict.

    Before anything is built: a model of a million layers takes minutes and gigabytes even without its weights.
    """
    layers = _layers_in(tensors or ()) or _MOST_BUILT
    widest = max((size for shape in (tensors or {}).values() for size in shape), default=_MOST_COUNTED)
    for name, value in _integers(settings):
        if "theta" in name or name.endswith("_id"):
            continue
        if abs(value) > (_MOST_BUILT if _BUILT.search(name) else _MOST_COUNTED if _COUNTS.search(name) else _MOST):
            raise _refused(path, name, value, "that is more than any model has")
        if name in _AT_LEAST_ONE and value < 1:
            raise _refused(path, name, value, "it must be at least 1")
        if name == "sliding_window" and value == 1:
            raise _refused(path, name, value, "transformers answers otherwise with its cache than without, at 1 alone")
        if name in _LAYERS and value > layers:
            raise _refused(path, name, value, f"the tensors are those of {layers} layers")
        if name in _EXPERTS and value > widest:
            raise _refused(path, name, value, f"the largest dimension of a tensor is {widest}, a router's too")


def check_default_layers(path: Path, config: Any, tensors: Iterable[str]) -> None:
    """Raises BadInput where config.json does not say how many layers there are, and the default has too many."""
    wanted, found = getattr(config.get_text_config(), "num_hidden_layers", 0), _layers_in(tensors)
    if found and isinstance(wanted, int) and wanted > found:
        raise BadInput(
            f"{path}: 'num_hidden_layers' is not there, and its default is {wanted}: the tensors are those of {found} "
            "layers",
            _OWN,
        )


def _layers_in(tensors: Iterable[str]) -> int:
    return max((int(m[1]) + 1 for name in tensors for m in _LAYER.finditer(name)), default=0)


def make_config(path: Path, settings: Mapping[str, Any], run_its_code: bool = False) -> Any:
    """transformers' configuration of a model with plain weights, fit for a capture.

    `path`: of config.json. Raises UnsupportedModel for an unknown model type, BadInput for a setting.
    """
    model_type = settings["model_type"]
    if not run_its_code and not is_known(model_type):
        if "auto_map" in settings:
            raise UnsupportedModel(
                f"{path}: transformers does not know model_type {model_type!r}, and the code that comes with it is "
                "not run",
                "If you trust its authors as you trust a program that you install: --trust-remote-code.",
            )
        raise UnsupportedModel(
            f"{path}: transformers does not know model_type {model_type!r}",
            "Update transformers, or choose another architecture.",
        )
    if run_its_code:
        from transformers import AutoConfig

        from_pretrained = cast("Callable[..., Any]", AutoConfig.from_pretrained)
        load = partial(from_pretrained, path.parent, trust_remote_code=True, local_files_only=True)
        return _neutralized(_of_its_own(path, model_type, load))
    return built(path, settings, _known_config)


def make_model(path: Path, settings: Mapping[str, Any], config: Any, run_its_code: bool = False) -> Any:
    """The language model of a configuration in float32, without weights, on the device that is torch's default.

    Raises UnsupportedModel where transformers has none, BadInput for a setting that it cannot be built with.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if config.is_encoder_decoder:
        raise UnsupportedModel(
            f"{path.parent}: {config.model_type} is an encoder-decoder; a bundle holds one graph that continues a "
            "text, and has no place for an encoder that runs before it",
            "Choose a decoder-only MoE language model.",
        )
    if not run_its_code and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModel(
            f"{path.parent}: transformers has no language model for model_type {config.model_type!r}",
            "Choose a decoder-only MoE language model.",
        )
    if run_its_code:
        return _of_its_own(path, config.model_type, lambda: _language_model(config, run_its_code=True))
    return built(path, settings, lambda changed: _language_model(_known_config(changed)))


def check_computes(path: Path, settings: Mapping[str, Any], compute: Callable[[Any], object]) -> None:
    """Raises BadInput for a setting without which `compute(model)` works, on a model without weights, and with which
    it does not; nothing where it works, or where no single setting is the cause."""

    def run(changed: Mapping[str, Any]) -> None:
        compute(_language_model(_known_config(changed)))

    try:
        run(settings)
    except Exception as error:
        place = culprit(settings, run)
        if place is not None:
            raise _wrong(path, place, settings, one_line(error)) from error


def is_known(model_type: str) -> bool:
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def built(path: Path, settings: Mapping[str, Any], build: Callable[[Mapping[str, Any]], _T]) -> _T:
    """`build(settings)`. What it raises becomes a BadInput that names the setting without which it does not."""
    try:
        return build(settings)
    except PocketMoEError:
        raise
    except ImportError as error:
        raise UnsupportedModel(
            f"{path}: this model needs a package that is not installed ({one_line(error)})", "Install it."
        ) from error
    except Exception as error:
        place = culprit(settings, build)
        if place is None:
            raise BadInput(f"{path}: transformers cannot use these settings ({one_line(error)})", _OWN) from error
        raise _wrong(path, place, settings, one_line(error)) from error


def culprit(settings: Mapping[str, Any], build: Callable[[Mapping[str, Any]], object]) -> Place | None:
    """The first setting without which `build` succeeds, outer name first where it is nested; None: there is none."""
    nested = [(name, inner) for name, value in settings.items() if is_object(value) for inner in value]
    places: list[Place] = [*nested, *((name,) for name in settings if name != "model_type")]
    for place in places[:_MOST_SUSPECTS]:
        try:
            build(_without(settings, place))
        except Exception:  # noqa: BLE001, S112 ; whatever it is, this setting alone is not the cause
            continue
        return place
    return None


def one_line(error: BaseException) -> str:
    """What an error says, on one line that is not too long for a message."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyError) or not text:
        text = f"{type(error).__name__} {text}".rstrip()
    return text if len(text) <= 300 else f"{text[:297]}..."


def _known_config(settings: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    plain = for_inference(settings)
    for name in ("auto_map", "quantization_config"):
        plain.pop(name, None)
    return _neutralized(CONFIG_MAPPING[settings["model_type"]].from_dict(plain))


def _of_its_own(path: Path, model_type: str, load: Callable[[], _T]) -> _T:
    """What the code that comes with a checkpoint makes. Raises UnsupportedModel whatever it raises."""
    try:
        return load()
    except Exception as error:
        raise UnsupportedModel(
            f"{path}: the code that comes with model_type {model_type!r} cannot be used ({one_line(error)})",
            "Update transformers, or ask its authors.",
        ) from error


def _neutralized(config: Any) -> Any:
    """The configuration, with logits and states alone asked for, and no padding that the embedding does not have.

    An embedding's padding index decides a gradient, never an output; transformers dies of one beyond the embedding.
    """
    from transformers import PreTrainedConfig

    nested = [value for value in config.__dict__.values() if isinstance(value, PreTrainedConfig)]
    for part in (config, *nested):
        if hasattr(part, "quantization_config"):
            delattr(part, "quantization_config")
        part.use_cache, part.return_dict = True, True
        part.output_hidden_states = part.output_attentions = False
        if hasattr(part, "output_router_logits"):
            part.output_router_logits = False
        padding, rows = getattr(part, "pad_token_id", None), getattr(part, "vocab_size", None)
        if isinstance(padding, int) and isinstance(rows, int) and not 0 <= padding < rows:
            part.pad_token_id = None
    if isinstance(getattr(config, "text_config", None), dict):  # which its class does not know as one
        delattr(config, "text_config")
    return config


def _language_model(config: Any, run_its_code: bool = False) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        from_config = cast("Callable[..., torch.nn.Module]", AutoModelForCausalLM.from_config)
        return from_config(config, dtype=torch.float32, trust_remote_code=run_its_code).eval()


def _with_special_floats(settings: dict[str, Any]) -> dict[str, Any]:
    """As newer versions of transformers write them: {"__float__": "Infinity"}."""
    return {name: _special_float(value) for name, value in settings.items()}


def _special_float(value: Any) -> Any:
    if is_object(value):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return _with_special_floats(value)
    return [_special_float(item) for item in value] if is_array(value) else value


def _integers(settings: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Whole numbers by name, nested ones and those in lists too."""
    for name, value in settings.items():
        for item in value if is_array(value) else [value]:
            if is_object(item):
                yield from _integers(item)
            elif isinstance(item, int):
                yield name, item


def _wrong(path: Path, place: Place, settings: Mapping[str, Any], why: str) -> BadInput:
    value = reduce(operator.getitem, place, settings)
    return _refused(path, ".".join(place), value, why)


def _refused(path: Path, name: str, value: Any, why: str) -> BadInput:
    return BadInput(f"{path}: {name!r} is {_shown(value)}: {why}", _OWN)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _without(settings: Mapping[str, Any], place: Place) -> dict[str, Any]:
    outer, *inner = place
    left = {name: value for name, value in settings.items() if name != outer}
    if inner:
        left[outer] = {name: value for name, value in settings[outer].items() if name != inner[0]}
    return left
