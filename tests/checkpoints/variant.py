"""One state of a checkpoint, and the ways of building them that several share."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import tiny

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
MIXTRAL: dict[str, Any] = {**SMALL, "num_local_experts": 4, "intermediate_size": 16}
PROMPTS = ("The quick brown fox", "Once upon a time there was a little girl")


@dataclass(frozen=True)
class Variant:
    """How a checkpoint is made, and what an export and a run of it must come to.

    `build(checkpoint, truth)` writes the checkpoint and, where transformers is to read another one (the plain weights
    that stored ones stand for), that one into `truth`. `refused`: a pattern that the refusal's line must match, in
    lower case; None: it must not be refused. `or_tokens`: tokens like transformers' will do too.
    """

    kind: str
    example: str
    build: Callable[[Path, Path], None]
    refused: str | None = None
    or_tokens: bool = False
    options: tuple[str, ...] = ()  # of export; {checkpoint} stands for its path
    prompts: tuple[str, ...] = PROMPTS
    chat: bool = False
    tokens: int = 12
    tokenizer_only: bool = False  # the model is the plain one: only the tokenizer is exported
    model: str = "mixtral"  # that one
    measure: str = "tokens"  # or: logits, open files, hub cache

    @property
    def name(self) -> str:
        return f"{self.kind}: {self.example}"


def checkpoint(directory: Path, family: str = "mixtral", **changes: Any) -> None:
    """A tiny random checkpoint as transformers saves it."""
    sizes = changes if family != "mixtral" else {**MIXTRAL, **changes}
    tiny.save_checkpoint(directory, tiny.make_model(family, **sizes))


def edit_json(path: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    settings = json.loads(path.read_text()) if path.exists() else {}
    settings.update(changes)
    for name in drop:
        settings.pop(name, None)
    path.write_text(json.dumps(settings))


def edit_tensors(directory: Path, edit: Callable[[dict[str, Any]], object], metadata: Any = None) -> None:
    """Change the tensors of model.safetensors by name, in place."""
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path, metadata or {"format": "pt"})
