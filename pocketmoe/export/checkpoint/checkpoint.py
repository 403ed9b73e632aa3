"""A checkpoint directory in the hub's layout: its configuration, and its tensors read one at a time.

Only safetensors are read: a pickle can run code. Code that comes with a checkpoint is not run either, unless asked to.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketmoe.errors import BadInput, UnsupportedModel
from pocketmoe.export.checkpoint import config
from pocketmoe.export.checkpoint.front_matter import ModelCard, read_card
from pocketmoe.export.packed import find
from pocketmoe.export.tensors import fp8, quantization
from pocketmoe.export.tensors.adapter import Adapter, refuse_adapter
from pocketmoe.export.tensors.directory import TEXT_BYTES, Directory
from pocketmoe.export.tensors.quantization import find_quantization
from pocketmoe.export.tensors.shards import FLOATS, Shards
from pocketmoe.jsonfile import is_array, is_object, read_object

if TYPE_CHECKING:
    import torch

_DOWNLOAD = "Download the checkpoint again."


class Checkpoint:
    """A checkpoint directory opened for reading."""

    def __init__(self, root: Path, run_its_code: bool = False, adapter: Path | None = None) -> None:
        """Find the shards and read their headers. Raises BadInput, UnsupportedModel or DamagedFile.

        `run_its_code`: run Python code that comes with it, where transformers does not know the model.
        `adapter`: the directory of a LoRA adapter to merge into the weights; without it one beside them is refused.
        """
        self.root = root
        self.directory = Directory(root)
        self.directory.check(("*.py",) if run_its_code else ())
        refuse_adapter(self.directory, is_chosen=adapter is not None)
        self.adapter = None if adapter is None else Adapter(adapter)
        self.settings = settings = config.read_settings(root)
        self.ran_code = run_its_code and not config.is_known(settings["model_type"])
        self.tokenizer_code = _tokenizer_code(root / "tokenizer_config.json")
        self.ran_tokenizer_code = run_its_code and self.tokenizer_code is not None
        self.quantization = find_quantization(settings, self.directory)
        quantization.refuse_turned_inputs(self.quantization)
        self.shards = Shards(self.directory, settings.get("transformers_weights"))
        path = root / config.FILE
        config.check_sizes(path, settings, {key: self.shards.shape(key) for key in self.shards.keys})
        self.config = config.make_config(path, settings, self.ran_code)
        config.check_default_layers(path, self.config, self.shards.keys)
        self._scales = {
            key: scale
            for key in self.shards.keys
            if self.shards.dtype(key) in fp8.DTYPES and (scale := fp8.scale_of(key, self.shards)) is not None
        }
        self.packed = find.find_packed(self.shards, self.quantization)
        self._hidden = set(self._scales.values()) | find.hidden(self.shards, self.packed)
        if self._scales or self.packed:
            self._hidden |= {key for key in self.shards.keys if fp8.is_other_scale(key)}
        self.stamps = {path: _stamp(path) for path in self.hashed().values()}

    def file(self, name: str) -> Path | None:
        """The path of one of its files that may be read (`Directory.file`); None where there is none."""
        return self.directory.file(name)

    def check_unchanged(self) -> None:
        """Raises BadInput when a file is not the one that was opened: parts of two checkpoints must not be mixed."""
        for path, stamp in self.stamps.items():
            if not path.exists() or _stamp(path) != stamp:
                raise BadInput(f"{path} was changed while it was being read", "Export again when it is complete.")

    @property
    def keys(self) -> list[str]:
        """The names of all tensors but those that only scale another, or activations; of packed weights their own."""
        return [*(key for key in self.shards.keys if key not in self._hidden), *self.packed]

    def shape(self, key: str) -> tuple[int, ...]:
        return self.packed[key].shape if key in self.packed else self.shards.shape(key)

    def dtype(self, key: str) -> str:
        """In safetensors' words; of a packed weight that of its codes."""
        return self.shards.dtype(self.packed[key].parts[0] if key in self.packed else key)

    def where(self, key: str) -> str:
        """The file and the tensor, for an error."""
        return self.shards.where(self.packed[key].parts[0] if key in self.packed else key)

    def check_floats(self, key: str) -> None:
        """Raises UnsupportedModel unless a tensor, by its header, can be read as floats."""
        if key in self.packed:
            return
        dtype, scale = self.shards.dtype(key), self._scales.get(key)
        if scale is not None:
            if self.shards.dtype(scale) not in (*FLOATS, *fp8.SCALE_DTYPES):
                raise quantization.refuse(self.shards.where(scale), self.shards.dtype(scale), self.quantization)
            return
        if dtype not in FLOATS:
            without = ", without a scale that is known" if dtype in fp8.DTYPES else ""
            raise quantization.refuse(self.shards.where(key), f"{dtype}{without}", self.quantization)
        scale = fp8.scale_of(key, self.shards) if self.quantization.method else None
        if scale is not None and scale.startswith(key):
            raise quantization.refuse(f"{self.shards.where(key)}, which {scale!r} scales,", dtype, self.quantization)

    def _has_experts(self, scale: str, key: str) -> bool:
        """Whether a scale has its weight's first axis, which counts the experts."""
        return len(self.shape(key)) == 3 and self.shape(scale)[:1] == self.shape(key)[:1]

    def read(self, key: str, index: int | None = None) -> torch.Tensor:
        """One tensor in its stored shape [...], floats as float32, or its slice [index : index + 1] along axis 0.

        Raises BadInput on NaN or Inf.
        """
        tensor = self._read_floats(key, index)
        if tensor.is_floating_point() and not _is_finite(tensor):
            where = "" if index is None else f" (expert {index})"
            raise BadInput(f"{self.where(key)}{where} holds NaN or infinite values", "Use an undamaged checkpoint.")
        return tensor

    def _read_floats(self, key: str, index: int | None) -> torch.Tensor:
        """The same unchecked; integers as they are."""
        if key in self.packed:
            tensor = self.packed[key].make(self.shards.read).dequantize()
            return tensor if index is None else tensor[index : index + 1]
        tensor, scale = self.shards.read(key, index), self._scales.get(key)
        if scale is not None:
            return fp8.dequantize(
                tensor,
                self.shards.read(scale, index if self._has_experts(scale, key) else None),
                self.quantization.blocks,
                self.shards.where(key),
                transposed=len(self.shape(key)) == 3 and str(self.quantization.method).startswith("fbgemm"),
            )
        if not tensor.is_floating_point():
            return tensor
        self.check_floats(key)
        return tensor.float()

    @property
    def origin(self) -> str | None:
        """How its weights were quantized, for the reader: GPTQ 4 bits, group 128; None for plain ones."""
        kinds = [find.describe(self.packed)] if self.packed else []
        if self._scales:
            kinds.append("eight-bit floats")
        if any(key.endswith("_blocks") for key in self.shards.keys):
            kinds.append("MXFP4")
        return "; ".join(kinds) or None

    @property
    def _is_plain(self) -> bool:
        return not self._scales and not self.packed and quantization.packed(self.shards) is None

    def check_method(self) -> None:
        """Raises UnsupportedModel for plain weights where a method is stated that cannot have left them so."""
        if self.quantization.method and self._is_plain and not quantization.is_left_behind(self.quantization):
            raise UnsupportedModel(
                f"{self.root / self.quantization.where} says that the weights are quantized "
                f"({self.quantization.method}), but no tensor is",
                "Take that entry out if they are not; else download the checkpoint again.",
            )

    @property
    def notes(self) -> tuple[str, ...]:
        """What its reader should know: settings that were found not to hold."""
        notes = (self._card.note,) if self._card.note else ()
        if self._is_plain and self.quantization.method:
            said = f"{self.quantization.where} says that the weights are quantized ({self.quantization.method})"
            notes += (f"{said}, but all are plain, and read as they are",)
        return notes if self.adapter is None else (self.adapter.note, *notes)

    @cached_property
    def _card(self) -> ModelCard:
        return read_card(self.directory)

    @property
    def card(self) -> str:
        """The text of README.md below its front matter; empty when there is none."""
        return self._card.text

    @property
    def card_data(self) -> dict[str, Any]:
        """The front matter of README.md; empty when there is none or it cannot be read."""
        return self._card.data

    def files(self) -> Iterator[Path]:
        """The files that determine the model: configuration, shards and their index, tokenizer."""
        for path in sorted(self.root.iterdir()):
            if path.name in self.shards.names or (path.suffix in {".json", ".jinja", ".model"} and path.is_file()):
                yield path
        yield from self.code_files()

    def hashed(self) -> dict[str, Path]:
        """The files that determine the bundle, by the names under which it states their hashes."""
        of_adapter = {} if self.adapter is None else {f"adapter/{path.name}": path for path in self.adapter.files}
        return {path.name: path for path in self.files()} | of_adapter

    def code_files(self) -> list[Path]:
        """The Python files that come with it, when they were run."""
        return sorted(self.root.glob("*.py")) if self.ran_code or self.ran_tokenizer_code else []


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; a finite sum says so in one pass."""
    import torch

    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _tokenizer_code(path: Path) -> str | None:
    """The class that tokenizer_config.json names of Python code that comes with the checkpoint; None where none is."""
    try:
        names = read_object(path, most_bytes=TEXT_BYTES).get("auto_map")
    except BadInput:
        return None
    names = names.get("AutoTokenizer") if is_object(names) else names
    named = [name for name in names if isinstance(name, str)] if is_array(names) else []
    return named[-1] if named else None


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
