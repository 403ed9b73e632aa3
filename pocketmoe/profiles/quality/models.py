"""What is compared: a bundle's engine, or a checkpoint that is run by transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from pocketmoe.bundle.manifest import MANIFEST
from pocketmoe.runtime.engine.engine import Engine


class ReferenceInfo(Protocol):
    """What a record says of a checkpoint (`export.reference.CheckpointInfo`)."""

    @property
    def path(self) -> Path: ...

    @property
    def seal(self) -> str: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def architecture(self) -> str: ...

    @property
    def source(self) -> str: ...

    @property
    def revision(self) -> str | None: ...

    @property
    def licence(self) -> str | None: ...

    @property
    def computed_by(self) -> str: ...

    @property
    def files(self) -> dict[str, str]: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...


class ReferenceModel(Protocol):
    """Logits of a text, as an engine gives them: `feed` appends to the text, `reset` begins another."""

    @property
    def about(self) -> ReferenceInfo:
        """What it is."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of a text, by its own tokenizer."""
        ...

    def reset(self) -> None:
        """Begin another text."""
        ...

    def feed(self, tokens: Sequence[int], rows: Literal["last", "all"] = "last") -> np.ndarray:
        """Append tokens. Returns logits, float32 [rows, vocab], of the last token or of all."""
        ...


OpenReference = Callable[[Path, int], ReferenceModel]
"""From a checkpoint and a number of threads."""

Model = Engine | ReferenceModel


def is_checkpoint(path: Path) -> bool:
    """Whether a reference is a checkpoint and no bundle: it has a config.json and no manifest."""
    return not (path / MANIFEST).exists() and (path / "config.json").is_file()


def place_of(model: Model) -> Path:
    """Where it lies, for a message."""
    return model.bundle.root if isinstance(model, Engine) else model.about.path


def ends_of(model: Model) -> set[int]:
    """The ids that end its texts."""
    return {*(model.bundle.manifest.model.eos_token_ids if isinstance(model, Engine) else model.about.eos_token_ids)}
