"""Where a checkpoint comes from: its origin on the hub, what its model card says of it, the hashes of its files."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import msgspec

from pocketmoe import __version__
from pocketmoe.bundle.manifest import Provenance
from pocketmoe.errors import DamagedFile, printable
from pocketmoe.export.checkpoint.checkpoint import Checkpoint
from pocketmoe.jsonfile import is_array

_TOOLS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "safetensors", "tokenizers")
_LONGEST = 200  # characters taken over of one entry of a model card
_CHUNK = 8 << 20


def describe(checkpoint: Checkpoint) -> Provenance:
    """All but the hashes of the files, which take a while (`Hashes`)."""
    data = checkpoint.card_data
    source, revision = _origin(checkpoint.root.resolve())
    return Provenance(
        source=source,
        revision=revision,
        licence=_text(data.get("license")),
        licence_name=_text(data.get("license_name")),
        licence_link=_text(data.get("license_link")),
        base_model=", ".join(_texts(data.get("base_model"))) or None,
        datasets=tuple(_texts(data.get("datasets"))),
        tools=_tools(),
        steps=("export fp32",) if checkpoint.adapter is None else (f"merge {checkpoint.adapter.name}", "export fp32"),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def plan(checkpoint: Checkpoint, options: str) -> str:
    """All that the bundle's bytes depend on, but for the files' content: files that were changed have other stamps."""
    stamps = {str(path): stamp for path, stamp in checkpoint.stamps.items()}
    adapter = None if checkpoint.adapter is None else str(checkpoint.adapter.root.resolve())
    return msgspec.json.encode([str(checkpoint.root.resolve()), adapter, stamps, _tools(), options]).decode()


def _tools() -> dict[str, str]:
    return {"pocketmoe": __version__} | {name: importlib.metadata.version(name) for name in _TOOLS}


def _texts(value: Any) -> list[str]:
    values = value if is_array(value) else [value]
    return [text for text in map(_text, values) if text]


def _text(value: Any) -> str | None:
    """A card is written by strangers: one printable line, of bounded length."""
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        return None
    text = printable(str(value), " ").strip()
    return text[:_LONGEST] or None


def _origin(root: Path) -> tuple[str, str | None]:
    """Hub id and commit of a directory in the hub's cache, models--ORG--NAME/snapshots/COMMIT; else its name."""
    repository = root.parent.parent.name
    if root.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/"), root.name
    return root.name, None


class Hashes:
    """SHA-256 of a checkpoint's files, each computed on a thread when the export begins to read its tensors.

    Tensors are then read from the page cache, which hashing has filled, as far as memory allows.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._files = checkpoint.hashed()
        self._pool = ThreadPoolExecutor(1)
        self._lock = threading.Lock()
        self._stopped = False
        self._found: dict[str, Future[str]] = {}

    def start(self) -> None:
        """From here on, what is read is hashed."""
        self._checkpoint.shards.on_read = self._begin

    def result(self) -> dict[str, str]:
        """By name, in the order of the checkpoint's files; waits for what is missing."""
        for name in self._files:
            self._begin(name)
        return {name: self._found[name].result() for name in self._files}

    def _begin(self, name: str) -> None:
        with self._lock:
            if name not in self._found:
                self._found[name] = self._pool.submit(self._hash, self._files[name])

    def _hash(self, path: Path) -> str:
        digest, chunk = hashlib.sha256(), bytearray(_CHUNK)
        try:
            with open(path, "rb", buffering=0) as file:
                while not self._stopped and (count := file.readinto(chunk)):
                    digest.update(memoryview(chunk)[:count])
        except OSError as error:
            raise DamagedFile(path, f"cannot be read ({error.strerror})", "Check the disk, or copy it anew.") from error
        return digest.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._checkpoint.shards.on_read = None
        self._pool.shutdown(wait=True, cancel_futures=True)
