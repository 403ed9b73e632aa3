"""Where a checkpoint comes from: its origin on the hub, what its model card says of it, the hashes of its files."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import msgspec

from pocketmoe import __version__
from pocketmoe.export.checkpoint import Checkpoint
from pocketmoe.manifest import Provenance

_TOOLS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "safetensors")
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
        steps=("export fp32",),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def plan(checkpoint: Checkpoint, options: str) -> str:
    """All that the bundle's bytes depend on, but for the files' content: files that were changed have other stamps."""
    stamps = {path.name: stamp for path, stamp in checkpoint.stamps.items()}
    return msgspec.json.encode([str(checkpoint.root.resolve()), stamps, _tools(), options]).decode()


def _tools() -> dict[str, str]:
    return {"pocketmoe": __version__} | {name: importlib.metadata.version(name) for name in _TOOLS}


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text for text in map(_text, values) if text]


def _text(value: Any) -> str | None:
    """A card is written by strangers: one printable line, of bounded length."""
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        return None
    text = "".join(c if c.isprintable() else " " for c in str(value)).strip()
    return text[:_LONGEST] or None


def _origin(root: Path) -> tuple[str, str | None]:
    """Hub id and commit of a directory in the hub's cache, models--ORG--NAME/snapshots/COMMIT; else its name."""
    repository = root.parent.parent.name
    if root.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/"), root.name
    return root.name, None


class Hashes:
    """SHA-256 of a checkpoint's files, computed on a thread of its own while their tensors are read.

    It goes through the shards as the export does, so that often one of the two finds in memory what the other has
    just read. Leaving the context stops it.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._files = sorted(checkpoint.files(), key=_natural)
        self._pool = ThreadPoolExecutor(1)
        self._stopped = False
        self._hashes: list[Future[str]] = []

    def start(self) -> None:
        self._hashes = [self._pool.submit(self._hash, path) for path in self._files]

    def result(self) -> dict[str, str]:
        """By name; waits for what is missing."""
        return {path.name: found.result() for path, found in zip(self._files, self._hashes, strict=True)}

    def _hash(self, path: Path) -> str:
        digest, chunk = hashlib.sha256(), bytearray(_CHUNK)
        with open(path, "rb", buffering=0) as file:
            while not self._stopped and (count := file.readinto(chunk)):
                digest.update(memoryview(chunk)[:count])
        return digest.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._pool.shutdown(wait=True, cancel_futures=True)


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]
