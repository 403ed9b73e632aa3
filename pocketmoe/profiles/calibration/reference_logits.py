"""A bundle's answers to some text, kept, and how far variants of it are from them: for comparing many to one.

What `evaluate` finds of two bundles by running both, chunk by chunk; here the reference runs once, and a variant takes
whole windows, so that its experts are read as seldom as can be.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import translate_write_errors
from pocketmoe.errors import BadInput
from pocketmoe.profiles.quality.divergence import compare_rows
from pocketmoe.profiles.quality.quality import Slice
from pocketmoe.profiles.quality.scoring import finite
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.tokenizer import Text

_WINDOW = 512  # tokens, less where a model's context is shorter


class ReferenceLogits:
    """The reference's logits lie in a file without a name, which goes with this object."""

    def __init__(
        self,
        reference: Bundle,
        slices: Sequence[Slice],
        options: EngineOptions,
        *,
        scratch: Path,
        tokens: int,
        progress: Progress = no_progress,
    ) -> None:
        """`tokens`: of each slice, its first. `scratch`: a directory with room for 4 bytes x tokens x vocabulary.

        The capacity in `options` is replaced. Raises BadInput for too short a text and for logits that are not finite,
        OutputError, and what opening and running an engine raises.
        """
        window = min(_WINDOW, reference.manifest.model.context_length)
        self._options = replace(options, capacity=window)
        texts = [np.array(Text(reference).encode(piece.text)[:tokens], np.int64) for piece in slices]
        self._windows = [text[at : at + window] for text in texts for at in range(0, len(text) - 1, window)]
        rows = sum(len(window) - 1 for window in self._windows)
        if not rows:
            raise BadInput("the text has fewer than 2 tokens", "Give more text.")
        with translate_write_errors(scratch), tempfile.TemporaryFile(dir=scratch) as file:
            self._logits = np.memmap(file, np.float32, "w+", shape=(rows, reference.manifest.model.vocab_size))
        for start, logits in self._run(reference, "measuring what it answers", progress):
            self._logits[start : start + len(logits)] = logits

    def mean_kl(self, variant: Bundle) -> float:
        """The mean KL divergence of a variant's next token from the reference's, in nats."""
        total = 0.0
        for (start, logits), window in zip(self._run(variant, "", no_progress), self._windows, strict=True):
            truth = self._logits[start : start + len(logits)]
            total += float(compare_rows(logits, truth, window[1:]).kl.sum())
        return total / len(self._logits)

    def _run(self, bundle: Bundle, what: str, progress: Progress) -> Iterator[tuple[int, np.ndarray]]:
        """Of each window the place of its first row among all, and its logits, float32 [rows, vocab]."""
        start = 0
        with Engine(bundle, self._options) as engine:
            for done, window in enumerate(self._windows):
                progress(what, done, len(self._windows))
                engine.reset()
                logits = finite(engine, engine.feed(window[:-1].tolist(), rows="all"))
                yield start, logits
                start += len(logits)
        progress(what, len(self._windows), len(self._windows))
