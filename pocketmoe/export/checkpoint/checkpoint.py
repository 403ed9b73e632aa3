"""A checkpoint directory in the hub's layout: its configuration, and its tensors read one at a time.

Only safetensors are read: a pickle can run code. Code that comes with a checkpoint is not run either, unless asked to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pocketmoe.errors import BadInput, DamagedFile, UnsupportedModel
from pocketmoe.export.tensors import fp8

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DOWNLOAD = "Download the checkpoint again."
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_QUANTIZED = ("mxfp4", *fp8.METHODS)  # ways of storing weights that are read as the numbers they stand for
_FLOATS = ("F64", "F32", "F16", "BF16")


class Checkpoint:
    """A checkpoint directory opened for reading."""

    def __init__(self, root: Path, run_its_code: bool = False) -> None:
        """Find the shards and read their headers. Raises BadInput, UnsupportedModel or DamagedFile.

        `run_its_code`: run Python code that comes with it, where transformers does not know the model.
        """
        self.root = root
        settings = _read_settings(root)
        self.ran_code = run_its_code and not _is_known(settings["model_type"])
        self.config = _read_config(root, settings, self.ran_code)
        self.quantization = _quantization(root / "config.json", settings)
        self.on_read: Callable[[str], None] | None = None  # told the shard's file name before each read
        self.shards: dict[str, Any] = {}  # file name -> open safetensors file
        self._shard_of: dict[str, str] = {}
        for name, expected in _find_shards(root).items():
            self._open_shard(root / name, expected)
        self._scales = fp8.Scales(self.quantization, settings.get("quantization_config") or {}, self._shard_of)
        self.stamps = {path: _stamp(path) for path in self.files()}

    def _open_shard(self, path: Path, expected: list[str] | None) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            shard = safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise DamagedFile(path, f"is not a whole safetensors file ({error})", _DOWNLOAD) from error
        self.shards[path.name] = shard
        found = set(shard.keys())
        missing = sorted(set(expected or ()) - found)
        if missing:
            raise DamagedFile(path, f"lacks tensor {missing[0]!r}, which {INDEX} says it holds", _DOWNLOAD)
        self._shard_of.update(dict.fromkeys(found if expected is None else expected, path.name))

    def check_unchanged(self) -> None:
        """Raises BadInput when a file is not the one that was opened: parts of two checkpoints must not be mixed."""
        for path, stamp in self.stamps.items():
            if not path.exists() or _stamp(path) != stamp:
                raise BadInput(f"{path} was changed while it was being read", "Export again when it is complete.")

    @property
    def keys(self) -> list[str]:
        """The names of all tensors but those that only scale another."""
        return [key for key in self._shard_of if key not in self._scales.hidden]

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.shards[self._shard_of[key]].get_slice(key).get_shape())

    def read(self, key: str, index: int | None = None) -> torch.Tensor:
        """One tensor, floats as float32, or its slice [index : index + 1]. Raises BadInput on NaN or Inf."""
        tensor, dtype = self._stored(key, index)
        path, scale = self.root / self._shard_of[key], self._scales.of(key)
        if scale is not None:
            tensor = fp8.dequantize(
                tensor, self._stored(scale, index)[0], self._scales.block, f"{path}: tensor {key!r}"
            )
        elif not tensor.is_floating_point():
            return tensor
        elif dtype not in _FLOATS:
            raise UnsupportedModel(
                f"{path}: tensor {key!r} is stored as {dtype}, without a scale that is known",
                "Save the checkpoint in bfloat16, float16 or float32 first.",
            )
        tensor = tensor.float()
        if not _is_finite(tensor):
            where = "" if index is None else f" (expert {index})"
            raise BadInput(
                f"{path}: tensor {key!r}{where} holds NaN or infinite values", "Use an undamaged checkpoint."
            )
        return tensor

    def _stored(self, key: str, index: int | None) -> tuple[torch.Tensor, str]:
        """A tensor or its slice as it is stored, and its dtype in safetensors' words."""
        if self.on_read is not None:
            self.on_read(self._shard_of[key])
        part = self.shards[self._shard_of[key]].get_slice(key)
        if not part.get_shape():
            return part[...], part.get_dtype()
        return part[:] if index is None else part[index : index + 1], part.get_dtype()

    @cached_property
    def card(self) -> str:
        """The text of README.md below its front matter; empty when there is none."""
        return _split_card(self.root)[1]

    @cached_property
    def card_data(self) -> dict[str, Any]:
        """The front matter of README.md; empty when there is none or it cannot be read."""
        return _split_card(self.root)[0]

    def files(self) -> Iterator[Path]:
        """The files that determine the model: configuration, shards and their index, tokenizer."""
        for path in sorted(self.root.iterdir()):
            if path.name in self.shards or (path.suffix in {".json", ".jinja", ".model"} and path.is_file()):
                yield path
        yield from self.code_files()

    def code_files(self) -> list[Path]:
        """The Python files that come with it, when they were run."""
        return sorted(self.root.glob("*.py")) if self.ran_code else []


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; a finite sum says so in one pass."""
    import torch

    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


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
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    return config


def _quantization(path: Path, raw: dict[str, Any]) -> str | None:
    """The method in `quantization_config`; None for plain weights. Raises UnsupportedModel for what cannot be read."""
    settings = raw.get("quantization_config")
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if not isinstance(method, str) or method not in _QUANTIZED or not fp8.is_readable(settings):
        raise UnsupportedModel(
            f"{path}: the weights are already quantized ({method or 'in an unknown way'})",
            "Export the unquantized checkpoint, then use: pocketmoe quantize.",
        )
    return method


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


def _find_shards(root: Path) -> dict[str, list[str] | None]:
    """The shards' file names, and which tensors the index expects in each (None without an index)."""
    index = root / INDEX
    if index.is_file():
        return _read_index(index)
    if (root / SINGLE).is_file():
        return {SINGLE: None}
    if any(True for pattern in _PICKLES for _ in root.glob(pattern)):
        raise BadInput(
            f"{root} has weights as pickle files only, which can run code and are not read",
            "Save the model as safetensors (transformers: save_pretrained).",
        )
    raise BadInput(f"{root} has neither {SINGLE} nor {INDEX}", _DOWNLOAD)


def _read_index(index: Path) -> dict[str, list[str] | None]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DamagedFile(index, "has no weight_map", _DOWNLOAD)
    shards: dict[str, list[str] | None] = {}
    for key, name in weight_map.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.\-]+\.safetensors", name):
            raise DamagedFile(index, f"names a shard outside the directory, or none: {str(name)[:80]!r}", _DOWNLOAD)
        keys = shards.setdefault(name, [])
        assert keys is not None
        keys.append(key)
    for name in shards:
        if not (index.parent / name).is_file():
            raise DamagedFile(index, f"names shard {name!r}, which is missing", _DOWNLOAD)
    return shards


def _split_card(root: Path) -> tuple[dict[str, Any], str]:
    path = root / "README.md"
    if not path.is_file():
        return {}, ""
    text = path.read_text(encoding="utf-8", errors="replace")
    match = re.match(r"---\r?\n(.*?)\r?\n---\r?\n?", text, re.DOTALL)
    if match is None:
        return {}, text
    import yaml

    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError:
        data = None
    return (json.loads(json.dumps(data, default=str)) if isinstance(data, dict) else {}), text[match.end() :]
