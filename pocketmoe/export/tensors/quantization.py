"""What a checkpoint says of how its weights are stored, and what its tensors say: the tensors decide.

Quantized weights that can be read are those in eight-bit floats (`fp8`), MXFP4, and the formats of `export/packed`; all
others are known by a name or an integer dtype, and refused before anything is computed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from pocketmoe.errors import DamagedFile, UnsupportedModel
from pocketmoe.export.tensors.directory import Directory
from pocketmoe.jsonfile import is_array, is_object, parse_object

INTEGERS = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F4", "F6_E2M3", "F6_E3M2"})
MODELOPT = "hf_quant_config.json"
_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # where older writers say what config.json lacks
REMEDY = "Export the checkpoint that it was made from, unquantized, then use: pocketmoe quantize."
_PACKED = {  # endings of tensors that stand for a weight, and who writes them
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".SCB": "bitsandbytes",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".weight_scale_2": "NVFP4",
    ".W_q": "HQQ",
    "_blocks": "MXFP4",
}
_LEFT_BEHIND = (
    "bitsandbytes",
    "fp8",
    "fbgemm_fp8",
    "mxfp4",
    "modelopt",
    "compressed-tensors",
)  # plain weights are read
_TURNED = (
    "transform_config",
    "hadamard_config",
    "rotation_config",
)  # where writers say that more than weights is turned
_BLOCKS = re.compile(r"(\d{1,9})\s*x\s*(\d{1,9})")


@dataclass(frozen=True)
class Quantization:
    """`method`: in the words of the file `where`, None for plain weights. `blocks`: rows and columns with one scale.

    `settings`: all that is said, of foreign making.
    """

    method: str | None = None
    where: str = "config.json"
    blocks: frozenset[tuple[int, int]] = frozenset()
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


def find_quantization(settings: Mapping[str, Any], directory: Directory) -> Quantization:
    """What config.json, or a file that writers put beside it, says; nothing of it is an error."""
    text = settings.get("text_config")
    for holder in (settings, text if is_object(text) else {}):
        for name in ("quantization_config", "compression_config"):
            if is_object(stated := holder.get(name)):
                return _describe(stated, "config.json")
    if is_object(stated := _read(directory, MODELOPT).get("quantization")):
        return _describe({"quant_method": "modelopt", **stated}, MODELOPT)
    for name, method in _BESIDE.items():
        if beside := _read(directory, name):
            return _describe({"quant_method": method, **beside}, name)
    return Quantization()


def _read(directory: Directory, name: str) -> dict[str, Any]:
    """The object in a file beside the weights; empty where there is none that can be read."""
    data = directory.read(name) or b"{}"
    try:
        return parse_object(data, directory.root / name)
    except DamagedFile:
        return {}


def _describe(settings: Mapping[str, Any], where: str) -> Quantization:
    words = [settings.get(name) for name in ("quant_method", "quant_algo", "format")]
    if words[0] is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        words[0] = "bitsandbytes"  # which older versions did not name
    method = " ".join(word[:40] for word in words if isinstance(word, str))
    return Quantization(method or "in an unknown way", where, frozenset(_blocks(settings)), settings)


def _blocks(settings: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Every size of blocks that the settings name."""
    groups = settings.get("config_groups")
    found = [group.get("weights") for group in groups.values() if is_object(group)] if is_object(groups) else []
    schemes = [scheme for scheme in found if is_object(scheme)]
    for scheme in schemes:
        size = scheme.get("group_size")
        if scheme.get("strategy") in ("group", "tensor_group") and _is_size(size):
            yield 1, size
    for block in (settings.get("weight_block_size"), *(scheme.get("block_structure") for scheme in schemes)):
        if isinstance(block, str) and (match := _BLOCKS.fullmatch(block.strip())):
            block = [int(match[1]), int(match[2])]
        if is_array(block) and len(block) == 2 and all(map(_is_size, block)):
            yield block[0], block[1]


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31


def refuse_turned_inputs(stated: Quantization) -> None:
    """Raises UnsupportedModel where the model has to rotate its activations as it runs, or may have to.

    What compressed-tensors applies to weights alone (`weight_input`, `weight_output`) is in the weights already.
    """
    for name in _TURNED:
        value = stated.settings.get(name)
        places = [*_values_of("location", value)]
        if value and not (places and all(place in ("weight_input", "weight_output") for place in places)):
            raise UnsupportedModel(
                f"{stated.where} says by {name} that activations are rotated while the model runs, which is not read",
                REMEDY,
            )


def _values_of(name: str, value: Any) -> Iterator[Any]:
    """What stands under a name, however deep."""
    if is_object(value):
        yield from ([value[name]] if name in value else [])
    for inner in value.values() if is_object(value) else value if is_array(value) else ():
        yield from _values_of(name, inner)


def is_left_behind(stated: Quantization) -> bool:
    """Whether plain weights are read although a method is stated, as transformers does: it quantizes while loading."""
    return str(stated.method).split()[0] in _LEFT_BEHIND


def packed(keys: Iterable[str]) -> tuple[str, str] | None:
    """The first tensor that stands for a weight in a packed form, and the method whose name it bears."""
    for key in keys:
        for ending, method in _PACKED.items():
            if key.endswith(ending):
                return key, method
    return None


def refuse(where: str, dtype: str, stated: Quantization, method: str | None = None) -> UnsupportedModel:
    """For a tensor (`where`: file and name) that is no plain number, by dtype and method."""
    said = f"{stated.where} says: {stated.method}" if stated.method else "config.json does not say how"
    by = f", as {method} does" if method else ""
    return UnsupportedModel(f"{where} is stored as {dtype}{by}; the weights are quantized ({said})", REMEDY)
