"""Which tensors of a checkpoint stand for a weight, and in which format: the tensors decide."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from pocketmoe.errors import BadInput
from pocketmoe.export.packed import bitsandbytes, compressed_tensors, gguf, gptq, modelopt
from pocketmoe.export.packed.grid import Packed
from pocketmoe.export.tensors.quantization import Quantization
from pocketmoe.export.tensors.shards import Shards

_LEFT_BEHIND = (".weight_shape", ".weight_format", ".weight_g_idx", ".g_idx")  # beside weights that are plain


def find_packed(shards: Shards, stated: Quantization) -> dict[str, Packed]:
    """The packed weights by the names that they would have if they were plain.

    Raises BadInput, UnsupportedModel, with file and name, for tensors that look like one of these formats and are not.
    """
    found: dict[str, Packed] = {}
    for weight in _each(shards, stated):
        if weight.name in found or (weight.name in shards and weight.name not in weight.parts):
            raise BadInput(
                f"{shards.where(weight.parts[0])} and another tensor both stand for {weight.name!r}",
                "Save the checkpoint again, in one format.",
            )
        found[weight.name] = weight
    return found


def _each(shards: Shards, stated: Quantization) -> Iterator[Packed]:
    plain = stated.method is None or str(stated.method).startswith("compressed-tensors")
    for key in shards:
        module, _, leaf = key.rpartition(".")
        if key.endswith(gptq.ENDING):
            yield gptq.packed(shards, stated, module)
        elif key.endswith(compressed_tensors.ENDING):
            yield compressed_tensors.packed(shards, stated, module)
        elif gguf.BLOCKS in key:
            yield gguf.packed(shards, key)
        elif bitsandbytes.STATE in key:
            yield bitsandbytes.four_bits(shards, key)
        elif key.endswith(bitsandbytes.EIGHT_BITS):
            yield bitsandbytes.eight_bits(shards, module)
        elif key.endswith(modelopt.ENDING) and (weight := modelopt.packed(shards, module)) is not None:
            yield weight
        elif plain and leaf == "weight" and shards.dtype(key) == "I8" and f"{key}_scale" in shards:
            yield compressed_tensors.octets(shards, module)


def hidden(shards: Shards, found: Mapping[str, Packed]) -> set[str]:
    """The tensors that are parts of a packed weight, and those that its writer left beside it."""
    parts = {part for weight in found.values() for part in weight.parts}
    if found:
        parts |= {key for key in shards if key.endswith(_LEFT_BEHIND)}
    return parts


def describe(found: Mapping[str, Packed]) -> str:
    """For the reader: GPTQ 4 bits, group 128; of several formats each with how many weights it has."""
    counts = Counter(weight.format for weight in found.values())
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{name} ({count} weights)" for name, count in counts.most_common())
