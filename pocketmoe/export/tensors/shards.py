"""The tensors of a checkpoint, by name, from one safetensors file or from shards with an index; read one at a time.

Which files hold the weights, and which of two tensors of one name counts, is what transformers makes of them:
`model.safetensors` before an index, every tensor of every shard that the index names, the last shard before the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pocketmoe.errors import BadInput, DamagedFile, first_line
from pocketmoe.export.tensors.directory import Directory
from pocketmoe.export.tensors.lfs import refuse_pointer
from pocketmoe.jsonfile import is_object, parse_object

if TYPE_CHECKING:
    from pathlib import Path

    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")
_DOWNLOAD = "Download the checkpoint again."
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_ADAPTERS = ("adapter_model.safetensors",)


class Shards:
    """The open safetensors files of a checkpoint; their headers are read, their tensors not yet."""

    def __init__(self, directory: Directory, named: Any = None, headers_only: bool = False) -> None:
        """`named`: the file or index that config.json names (`transformers_weights`). Raises BadInput, DamagedFile.

        `headers_only`: nothing is going to be read, for which torch would have to be imported.
        """
        self._framework = "np" if headers_only else "pt"
        self._directory = directory
        self.on_read: Callable[[str], None] | None = None  # told the shard's file name before each read
        self.index: Path | None = None
        self.names = self._find(named)
        self._open: dict[str, Any] = {}
        self._shard_of: dict[str, str] = {}
        self._dtypes: dict[str, str] = {}
        for name in self.names:
            self._add(name)

    def _find(self, named: Any) -> list[str]:
        root = self._directory.root
        if named is not None:
            if not isinstance(named, str) or not re.fullmatch(r"[\w.\-]+\.safetensors(\.index\.json)?", named):
                raise BadInput(
                    f"{root / 'config.json'}: transformers_weights names no safetensors file or index in the directory",
                    "Name one, or remove the entry.",
                )
            if self._directory.file(named) is None:
                raise BadInput(f"{root} lacks {named}, which config.json names (transformers_weights)", _DOWNLOAD)
            return self._read_index(named) if named.endswith(".json") else [named]
        if self._directory.file(SINGLE) is not None:
            return [SINGLE]
        if self._directory.file(INDEX) is not None:
            return self._read_index(INDEX)
        raise _no_weights(root)

    def _read_index(self, name: str) -> list[str]:
        """The shards that an index names, in the order in which they are read."""
        path = self.index = self._directory.root / name
        weight_map = parse_object(self._directory.read(name) or b"", path, _DOWNLOAD).get("weight_map")
        if not is_object(weight_map) or not weight_map:
            raise DamagedFile(path, "has no weight_map", _DOWNLOAD)
        for shard in weight_map.values():
            if not isinstance(shard, str) or not re.fullmatch(r"[\w.\-]+\.safetensors", shard):
                raise DamagedFile(path, f"names a shard outside the directory, or none: {str(shard)[:80]!r}", _DOWNLOAD)
        names: list[str] = sorted(set(weight_map.values()))
        missing = [shard for shard in names if self._directory.file(shard) is None]
        if missing:
            others = sorted({p.name for p in path.parent.glob("*.safetensors")} - set(names) - set(_ADAPTERS))
            also = f"; {others[0]} is there, which it does not name" if others else ""
            raise DamagedFile(
                path,
                f"names shard {missing[0]!r}, which is missing ({len(missing)} of {len(names)}){also}",
                f"Download the checkpoint again{', or the index that belongs to these shards' if others else ''}.",
            )
        return names

    def _add(self, name: str) -> None:
        from safetensors import SafetensorError, safe_open

        path = self._directory.root / name
        refuse_pointer(path)
        try:
            shard: Any = safe_open(path, self._framework)
            dtypes = {key: str(shard.get_slice(key).get_dtype()) for key in shard.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise DamagedFile(path, f"is not a whole safetensors file ({first_line(error)})", _DOWNLOAD) from error
        self._open[name] = shard
        self._dtypes.update(dtypes)
        self._shard_of.update(dict.fromkeys(dtypes, name))

    @property
    def keys(self) -> list[str]:
        return list(self._shard_of)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard_of)

    def __contains__(self, key: object) -> bool:
        return key in self._shard_of

    def dtype(self, key: str) -> str:
        """In safetensors' words: F32, BF16, F8_E4M3, I8, ..."""
        return self._dtypes[key]

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._open[self._shard_of[key]].get_slice(key).get_shape())

    def where(self, key: str) -> str:
        """The file and the tensor, for an error."""
        return f"{self._directory.root / self._shard_of[key]}: tensor {key!r}"

    def read(self, key: str, index: int | None = None) -> torch.Tensor:
        """A tensor in its stored shape [...] and dtype, or its slice [index : index + 1] along axis 0."""
        name = self._shard_of[key]
        if self.on_read is not None:
            self.on_read(name)
        part = self._open[name].get_slice(key)
        if not part.get_shape():
            return part[...]
        return part[:] if index is None else part[index : index + 1]


def _no_weights(root: Path) -> BadInput:
    """What a directory without a file that transformers would read has instead."""
    found = sorted(path.name for path in root.glob("*.safetensors") if path.name not in _ADAPTERS)
    if any(re.search(r"-of-\d+\.safetensors$", name) for name in found):
        return BadInput(f"{root} has shards ({found[0]}), but no {INDEX}", f"Download {INDEX} too, beside the shards.")
    if found:
        return BadInput(
            f"{root} has neither {SINGLE} nor {INDEX}; {found[0]} is not read in their place",
            f"If it holds the whole model, under transformers' names: rename it to {SINGLE}.",
        )
    if any(True for pattern in _PICKLES for _ in root.glob(pattern)):
        return BadInput(
            f"{root} has weights as pickle files only, which can run code and are not read",
            "Save the model as safetensors (transformers: save_pretrained).",
        )
    return BadInput(f"{root} has neither {SINGLE} nor {INDEX}", _DOWNLOAD)
