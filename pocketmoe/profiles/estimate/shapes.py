"""How large a model is, class by class, from its config.json or its bundle: no weights, no torch.

A configuration is read by its fields, not by the model's name. Where a field says that layers are built otherwise
(recurrent, convolutional, experts without a gate, ...), the counting is left to who can build the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketmoe.errors import BadInput, UnsupportedModel, install, printable
from pocketmoe.jsonfile import is_array, is_object, read_object

_NAME = "Name a bundle, a checkpoint's directory or its config.json."
_ATTENTION_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
_OTHERWISE = (  # fields of layers that are built otherwise
    "ssm_cfg", "mamba_d_state", "mamba_n_heads", "conv_L_cache", "linear_num_key_heads", "attn_config", "ffn_config",
    "interleave_moe_layer_step", "full_attn_idxs", "hybrid_override_pattern", "attn_layer_period",
)  # fmt: skip
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk")
_MOST = 1 << 31
_MOST_LAYERS, _MOST_EXPERTS, _MOST_CHOSEN = 10_000, 1 << 14, 1024
_MOST_OF = {  # what is replayed and counted grows with these; the largest models of today have a tenth of each
    "num_hidden_layers": _MOST_LAYERS,
    **dict.fromkeys(_EXPERTS, _MOST_EXPERTS),
    **dict.fromkeys(_TOP_K, _MOST_CHOSEN),
    "hidden_size": 1 << 20,
    "vocab_size": 1 << 26,
}


@dataclass(frozen=True)
class Shape:
    """Parameters by class. `dense`: by role as in the manifest; `shared_expert` includes the MLPs of dense layers."""

    architecture: str
    model_type: str
    moe_layers: int
    experts: int  # of one layer
    top_k: int
    expert_parameters: int  # of one expert
    dense: Mapping[str, int]
    layers: int
    hidden_size: int
    attention_heads: int
    vocab_size: int
    context_length: int
    kv_values_per_token: int  # of all layers, as our runtime keeps them
    served_kv_values_per_token: int  # as servers keep them: compressed where the attention is latent
    counted_from: str

    @property
    def routed_parameters(self) -> int:
        return self.moe_layers * self.experts * self.expert_parameters

    @property
    def parameters(self) -> int:
        return self.routed_parameters + sum(self.dense.values())

    @property
    def active_parameters(self) -> int:
        """What a token is multiplied with: the dense part, and the experts that it is routed to.

        Not an embedding of its own, of which it reads a row; one that is the head as well counts as the head. So counts
        OpenAI; of eight published figures that comes within 3% in the mean and 9% at most, where counting the embedding
        would be 5% and 16% off, and leaving out the head as well 10% and 17%.
        """
        rows_only = self.dense.get("embedding", 0) if self.dense.get("head", 0) else 0
        return sum(self.dense.values()) - rows_only + self.moe_layers * self.top_k * self.expert_parameters

    @property
    def has_shared_experts(self) -> bool:
        return self.dense.get("shared_expert", 0) > 0


def read_config(path: Path) -> dict[str, Any]:
    """The config.json at `path` or in that directory. Raises BadInput or DamagedFile."""
    if not path.exists():
        raise BadInput(f"{path} does not exist", _NAME)
    return read_object(path / "config.json" if path.is_dir() else path, remedy=_NAME)


def check_bounds(config: Mapping[str, Any], where: str) -> None:
    """Raises UnsupportedModel for counts that no model has, before anything as large as they say is built."""
    nested = config.get("text_config")
    for part in (config, nested if is_object(nested) else {}):
        for name, most in _MOST_OF.items():
            value = part.get(name)
            if isinstance(value, int | float) and not 0 <= value <= most:
                _Fields(part, where).maybe(name)


def refuse_dense(config: Mapping[str, Any], where: str) -> None:
    """Raises UnsupportedModel for a whole configuration in which nothing speaks of experts, without building it."""
    nested = [value for value in config.values() if is_object(value)]
    names = [str(name).lower() for part in (config, *nested) for name in part]
    if "hidden_size" in names and not any("expert" in name or "moe" in name for name in names):
        raise UnsupportedModel(
            f"{where} is of a dense model: it has no experts to page",
            "Name a mixture of experts, or run a dense model with llama.cpp or ONNX Runtime itself.",
        )


def shape_of_config(config: Mapping[str, Any], where: str) -> Shape:
    """Count from configuration fields alone. Raises UnsupportedModel where they do not suffice."""
    if "text_config" in config and "hidden_size" not in config:
        config = nested if is_object(nested := config["text_config"]) else {}
    fields = _Fields(config, where)
    fields.refuse_other_layouts()
    hidden, layers, vocab = fields("hidden_size"), fields("num_hidden_layers"), fields("vocab_size")
    experts, top_k = fields(*_EXPERTS), fields(*_TOP_K)
    width = fields("moe_intermediate_size", "intermediate_size")
    moe_layers = _count_moe_layers(fields, layers)
    if not moe_layers or experts < 2 or top_k > experts:
        raise UnsupportedModel(f"{where} is not of a mixture of experts", "Name a model with routed experts.")
    shared = fields.maybe("n_shared_experts", "moe_num_shared_experts", "num_shared_experts") * width
    shared += fields.maybe("shared_expert_intermediate_size", "shared_intermediate_size")
    dense_mlp = 3 * hidden * fields("intermediate_size", "moe_intermediate_size")
    attention, kv_values, served = _attention(fields, hidden)
    tied = config.get("tie_word_embeddings") is True
    return Shape(
        architecture=_architecture(config),
        model_type=_text(config.get("model_type")),
        moe_layers=moe_layers,
        experts=experts,
        top_k=top_k,
        expert_parameters=3 * hidden * width,
        dense={
            "embedding": vocab * hidden,
            "head": 0 if tied else vocab * hidden,
            "attention": layers * attention,
            "shared_expert": moe_layers * 3 * hidden * shared + (layers - moe_layers) * dense_mlp,
            "router": moe_layers * hidden * experts,
            "norm": (2 * layers + 1) * hidden,
        },
        layers=layers,
        hidden_size=hidden,
        attention_heads=fields("num_attention_heads"),
        vocab_size=vocab,
        context_length=fields.maybe("max_position_embeddings") or 4096,
        kv_values_per_token=layers * kv_values,
        served_kv_values_per_token=layers * served,
        counted_from="the fields of config.json",
    )


class _Fields:
    """Whole numbers of a configuration, by any of their names."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config, self.where = config, where

    def __call__(self, *names: str) -> int:
        """The first that is there. Raises UnsupportedModel when none is."""
        value = self.maybe(*names)
        if not value:
            raise UnsupportedModel(f"{self.where} has no {names[0]}", install("export"))
        return value

    def maybe(self, *names: str) -> int:
        """The first that is there, or 0."""
        for name in names:
            value = self.config.get(name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _MOST:
                raise self.otherwise(name)
            if value > _MOST_OF.get(name, _MOST):
                raise UnsupportedModel(
                    f"{self.where}: {name} is {value}, and no model has more than {_MOST_OF[name]}",
                    "Correct config.json, or download it again.",
                )
            return value
        return 0

    def refuse_other_layouts(self) -> None:
        """Raises UnsupportedModel for layers that are not attention and gated experts."""
        for name in _OTHERWISE:
            if self.config.get(name) is not None:
                raise self.otherwise(name)
        kinds: Any = self.config.get("layer_types") or []
        if not is_array(kinds) or not {str(kind) for kind in kinds} <= _ATTENTION_KINDS:
            raise self.otherwise("layer_types")
        if "relu2" in str(self.config.get("mlp_hidden_act")):
            raise self.otherwise("mlp_hidden_act")

    def otherwise(self, name: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self.where}: {name} says that the layers are built in a way that cannot be counted from the fields",
            install("export"),
        )


def _count_moe_layers(fields: _Fields, layers: int) -> int:
    """Some architectures make their first layers dense, or every other one."""
    sparse = set(range(fields.maybe("first_k_dense_replace", "num_dense_layers"), layers))
    if fields.maybe("moe_layer_interval"):
        last = fields.config.get("moe_layer_end_index")
        last = layers - 1 if not isinstance(last, int) or last < 0 else last
        sparse.intersection_update(
            layer
            for layer in range(layers)
            if layer in range(fields.maybe("moe_layer_start_index"), last + 1, fields.maybe("moe_layer_interval"))
        )
    step = fields.maybe("decoder_sparse_step") or 1
    sparse -= {layer for layer in sparse if (layer + 1) % step}
    frequency = fields.config.get("moe_layer_freq")
    if isinstance(frequency, int) and frequency > 1:
        sparse -= {layer for layer in sparse if layer % frequency}
    only = fields.config.get("mlp_only_layers")
    return len(sparse - {layer for layer in (only if is_array(only) else []) if isinstance(layer, int)})


def _attention(fields: _Fields, hidden: int) -> tuple[int, int, int]:
    """Of one layer: parameters, values of keys and values as we keep them, and as servers keep them."""
    heads = fields("num_attention_heads")
    latent = fields.maybe("kv_lora_rank")
    if latent:
        rope, nope, v = fields("qk_rope_head_dim"), fields("qk_nope_head_dim"), fields("v_head_dim")
        rank = fields.maybe("q_lora_rank")
        query = hidden * rank + rank * heads * (nope + rope) if rank else hidden * heads * (nope + rope)
        key_value = hidden * (latent + rope) + latent * heads * (nope + v)
        return query + key_value + heads * v * hidden, heads * (nope + rope + v), latent + rope
    size = fields.maybe("head_dim") or hidden // heads
    kv_heads = fields.maybe("num_key_value_heads") or heads
    return 2 * hidden * size * (heads + kv_heads), 2 * kv_heads * size, 2 * kv_heads * size


def shape_of_counts(config: Mapping[str, Any], counts: Mapping[str, int], where: str) -> Shape:
    """From parameters that were counted on the model itself: by role, with `experts` (all), `moe_layers`, `n_experts`.

    Only what the configuration says of attention's cache is read from fields. Raises UnsupportedModel.
    """
    nested = config.get("text_config")
    fields = _Fields({**config, **(nested if isinstance(nested, dict) else {})}, where)
    layers, hidden = fields("num_hidden_layers"), fields("hidden_size")
    _, kv_values, served = _attention(fields, hidden)
    each = counts["experts"] // (counts["moe_layers"] * counts["n_experts"])
    roles = {role: n for role, n in counts.items() if role not in ("experts", "moe_layers", "n_experts")}
    return Shape(
        architecture=_architecture(config),
        model_type=_text(config.get("model_type")),
        moe_layers=counts["moe_layers"],
        experts=counts["n_experts"],
        top_k=fields(*_TOP_K),
        expert_parameters=each,
        dense=roles,
        layers=layers,
        hidden_size=hidden,
        attention_heads=fields("num_attention_heads"),
        vocab_size=fields("vocab_size"),
        context_length=fields.maybe("max_position_embeddings") or 4096,
        kv_values_per_token=layers * kv_values,  # an upper bound where some layers keep a state of one size
        served_kv_values_per_token=layers * served,
        counted_from="the model built by transformers on the meta device",
    )


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return _text(names[0] if isinstance(names, list) and names else None)


def _text(value: Any) -> str:
    """A name out of a foreign file, fit for a terminal."""
    text = value if isinstance(value, str) else "unknown"
    return printable(text, "")[:80] or "unknown"
