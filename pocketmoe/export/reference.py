"""The checkpoint as transformers runs it, in float32: what a bundle is compared with, with nothing between."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pocketmoe.errors import BadInput
from pocketmoe.export.checkpoint import provenance
from pocketmoe.export.checkpoint.checkpoint import Checkpoint
from pocketmoe.jsonfile import is_array


@dataclass(frozen=True)
class CheckpointInfo:
    """What a record says of it. `seal`: one SHA-256 over the names and hashes of its files."""

    path: Path
    seal: str
    nbytes: int
    architecture: str
    source: str
    revision: str | None
    licence: str | None
    computed_by: str
    files: dict[str, str]  # SHA-256, by name, as a bundle's provenance has them
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class TransformersModel:
    """All of its weights are in memory, in float32. Its own caches carry a text on."""

    def __init__(self, path: Path, threads: int) -> None:
        """Load it. Raises BadInput, UnsupportedModel or DamagedFile."""
        import transformers

        checkpoint = Checkpoint(path)
        torch.set_num_threads(threads)
        try:
            with _quiet():
                found: Any = transformers.AutoModelForCausalLM.from_pretrained(
                    path, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
                )
                self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                    path, local_files_only=True, trust_remote_code=False
                )
        except (OSError, ValueError, ImportError, RuntimeError, KeyError, AttributeError, TypeError) as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BadInput(
                f"{path} cannot be run by transformers ({said[:200]})", "Compare with a float32 bundle of it instead."
            ) from error
        self._model = found.eval()
        self._text: list[int] = []
        self._past: Any = None
        files = {name: _sha256(file) for name, file in sorted(checkpoint.hashed().items())}
        origin = provenance.describe(checkpoint)
        ends: Any = found.generation_config.eos_token_id
        self.about = CheckpointInfo(
            path=path,
            seal=hashlib.sha256("".join(f"{name} {sha}\n" for name, sha in files.items()).encode()).hexdigest(),
            nbytes=sum(file.stat().st_size for file in checkpoint.hashed().values()),
            architecture=type(found).__name__,
            source=origin.source,
            revision=origin.revision,
            licence=origin.licence,
            computed_by=f"transformers {transformers.__version__}, torch {torch.__version__}, float32",
            files=files,
            vocab_size=int(found.config.get_text_config().vocab_size),
            eos_token_ids=tuple(map(int, ends if is_array(ends) else [] if ends is None else [ends])),
        )

    def encode(self, text: str) -> list[int]:
        """The ids of a text, by its own tokenizer."""
        return list(map(int, self._tokenizer(text, verbose=False)["input_ids"]))

    def reset(self) -> None:
        """Begin another text."""
        self._text, self._past = [], None

    def feed(self, tokens: Sequence[int], rows: Literal["last", "all"] = "last") -> np.ndarray:
        """Append tokens. Returns logits, float32 [rows, vocab], of the last token or of all.

        A model with states that overwrite reads the text from its beginning each time: not every one of them goes on
        from a state by several tokens as it would have come to it.
        """
        self._text += tokens
        anew = bool(getattr(self._model, "_is_stateful", False))
        ids = torch.tensor([self._text if anew else list(tokens)])
        with torch.inference_mode():
            out = self._model(input_ids=ids, past_key_values=None if anew else self._past, use_cache=not anew)
        self._past = None if anew else out.past_key_values
        logits = out.logits[0, -len(tokens) :].float().numpy()
        return np.ascontiguousarray(logits if rows == "all" else logits[-1:])


@contextlib.contextmanager
def _quiet() -> Any:
    """transformers tells a terminal what it loads; its remarks are not the user's business here."""
    logger = logging.getLogger("transformers")
    before, logger.disabled = logger.disabled, True
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.disabled = before


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
