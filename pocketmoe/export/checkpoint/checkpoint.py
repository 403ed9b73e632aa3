"""A checkpoint directory in the hub's layout: its configuration, and its tensors read one at a time.

Only safetensors are read: a pickle can run code. Code that comes with a checkpoint is not run either, unless asked to.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pocketmoe.errors import BadInput, DamagedFile, UnsupportedModel
from pocketmoe.export.checkpoint.front_matter import ModelCard, read_card
from pocketmoe.export.tensors import fp8, quantization
from pocketmoe.export.tensors.adapter import Adapter, refuse_adapter
from pocketmoe.export.tensors.directory import Directory
from pocketmoe.export.tensors.quantization import find_quantization
from pocketmoe.export.tensors.shards import FLOATS, Shards

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
        settings = _read_settings(root)
        self.ran_code = run_its_code and not _is_known(settings["model_type"])
        self.tokenizer_code = _tokenizer_code(root / "tokenizer_config.json")
        self.ran_tokenizer_code = run_its_code and self.tokenizer_code is not None
        self.config = _read_config(root, settings, self.ran_code)
        self.quantization = find_quantization(settings, self.directory)
        self.shards = Shards(self.directory, settings.get("transformers_weights"))
        self._scales = {
            key: scale
            for key in self.shards.keys
            if self.shards.dtype(key) in fp8.DTYPES and (scale := fp8.scale_of(key, self.shards)) is not None
        }
        self._hidden = set(self._scales.values())
        if self._scales:
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
        """The names of all tensors but those that only scale another, or activations."""
        return [key for key in self.shards.keys if key not in self._hidden]

    def shape(self, key: str) -> tuple[int, ...]:
        return self.shards.shape(key)

    def check_floats(self, key: str) -> None:
        """Raises UnsupportedModel unless a tensor, by its header, can be read as floats."""
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
        """Whether a scale has the first axis of its weight: that of the experts."""
        return len(self.shape(key)) == 3 and self.shape(scale)[:1] == self.shape(key)[:1]

    def read(self, key: str, index: int | None = None) -> torch.Tensor:
        """One tensor, floats as float32, or its slice [index : index + 1]. Raises BadInput on NaN or Inf."""
        tensor, scale = self.shards.read(key, index), self._scales.get(key)
        if scale is not None:
            tensor = fp8.dequantize(
                tensor,
                self.shards.read(scale, index if self._has_experts(scale, key) else None),
                self.quantization.blocks,
                self.shards.where(key),
                transposed=len(self.shape(key)) == 3 and str(self.quantization.method).startswith("fbgemm"),
            )
        elif not tensor.is_floating_point():
            return tensor
        else:
            self.check_floats(key)
        tensor = tensor.float()
        if not _is_finite(tensor):
            where = "" if index is None else f" (expert {index})"
            raise BadInput(
                f"{self.shards.where(key)}{where} holds NaN or infinite values", "Use an undamaged checkpoint."
            )
        return tensor

    @property
    def _is_plain(self) -> bool:
        return not self._scales and quantization.packed(self.shards) is None

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
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    names = settings.get("auto_map") if isinstance(settings, dict) else None
    names = names.get("AutoTokenizer") if isinstance(names, dict) else names
    named = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    return named[-1] if named else None


def _is_known(model_type: str) -> bool:
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def _read_settings(root: Path) -> dict[str, Any]:
    """config.json, which names a model type. Raises BadInput, DamagedFile or UnsupportedModel."""
    if not root.is_dir():
        raise BadInput(f"{root} is not a directory", "Name a directory with config.json and *.safetensors.")
    path = root / "config.json"
    if not path.is_file():
        raise BadInput(f"{root} has no config.json", "Name the directory of a checkpoint in the Hugging Face layout.")
    raw = _read_json(path)
    if not isinstance(raw.get("model_type"), str):
        raise UnsupportedModel(f"{path} names no model_type", "Name a checkpoint that transformers can read.")
    return raw


def _read_config(root: Path, settings: dict[str, Any], run_its_code: bool) -> Any:
    """The transformers configuration, as of a model with plain weights. Raises UnsupportedModel."""
    from transformers import AutoConfig

    path, model_type = root / "config.json", settings["model_type"]
    if "auto_map" in settings and not run_its_code and not _is_known(model_type):
        raise UnsupportedModel(
            f"{path}: transformers does not know model_type {model_type!r}, and the code that comes with it is not run",
            "If you trust its authors as you trust a program that you install: --trust-remote-code.",
        )
    try:
        config = AutoConfig.from_pretrained(root, trust_remote_code=run_its_code, local_files_only=True)
    except Exception as error:
        raise UnsupportedModel(
            f"{path}: transformers cannot take model_type {model_type!r} ({_first_line(error)})",
            "Update transformers, or choose another architecture.",
        ) from error
    _forget_quantization(config)
    return config


def _forget_quantization(config: Any) -> None:
    """Take away what a configuration says of quantization; and a text_config that its class does not know as one."""
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    if isinstance(getattr(config, "text_config", None), dict):
        delattr(config, "text_config")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DamagedFile(path, f"cannot be read ({error})", _DOWNLOAD) from error
    return value


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__
