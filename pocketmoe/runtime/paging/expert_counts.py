"""How many tokens were routed to each expert: how even that was, and which experts to load before the first token.

These counts are all that is kept of a text by default. Unlike a trace they do not say which token chose which experts.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from pocketmoe.bundle.packed import EXPERT_COUNTS
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import ExpertId
from pocketmoe.calibration import SUMMARY, CalibrationSummary
from pocketmoe.errors import DamagedFile
from pocketmoe.system.files import CLOEXEC, NO_LINK, NO_WAITING, open_folder

_HOTTEST = 0.25  # of a layer's experts
_FADE = 4096  # tokens, after which a count has lost half


@dataclass(frozen=True)
class RoutingSummary:
    """Means over the layers. Both are about 1 and a quarter where every expert is used alike."""

    entropy: float  # of the experts' shares of all choices, as a share of the highest possible
    hottest_quarter: float  # share of the choices that fall on the most used quarter of the experts


def summarize(counts: np.ndarray, experts: Sequence[int]) -> RoutingSummary | None:
    """None where no token was routed yet.

    `counts`: int [layers, most experts of a layer], tokens routed to each; `experts`: how many each layer has.
    """
    entropies: list[float] = []
    hottest: list[float] = []
    for row, n_experts in zip(counts, experts, strict=True):
        share = np.sort(row[:n_experts] / max(1, row.sum()))[::-1]
        used = share[share > 0]
        if len(used):
            entropies.append(float(-(used * np.log(used)).sum() / np.log(n_experts)) if n_experts > 1 else 1.0)
            hottest.append(float(share[: max(1, round(_HOTTEST * n_experts))].sum()))
    return RoutingSummary(float(np.mean(entropies)), float(np.mean(hottest))) if entropies else None


def shares(counts: np.ndarray, top_k: Sequence[int]) -> np.ndarray:
    """The share of a layer's tokens that chose each expert, float [layers, experts], for `ExpertCache.expect`.

    `counts`: int [layers, experts]; `top_k`: experts per token in each layer.
    """
    tokens = counts.sum(axis=1) / np.asarray(top_k)
    return counts / np.maximum(1.0, tokens)[:, None]


def to_load_first(chosen_shares: np.ndarray, pool: Iterable[ExpertId], n_slots: int) -> list[ExpertId]:
    """The experts of a pool to fill half of its slots with before the first token, likeliest first.

    Those that tokens choose most often, all layers together, never one that nobody chose. `chosen_shares`: float
    [layers, experts], from `shares`; tell them to `ExpertCache.expect` first. Half of the slots: in replays
    (docs/LOG.md) most of these reads were hits within 64 tokens, of those into the other half a tenth to a half.
    """
    ranked = sorted((expert for expert in pool if chosen_shares[expert] > 0), key=lambda e: (-chosen_shares[e], e))
    return ranked[: n_slots // 2]


def calibrated_counts(bundle: Bundle) -> np.ndarray | None:
    """Tokens of the calibration text that chose each expert, float64 [layers, most experts]; None without one.

    Raises DamagedFile for a summary that is not of this model.
    """
    if SUMMARY not in bundle.manifest.files:
        return None
    path = bundle.path(SUMMARY)
    experts = [layer.n_experts for layer in bundle.manifest.moe_layers]
    try:
        layers = msgspec.json.decode(path.read_bytes(), type=CalibrationSummary).layers
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise DamagedFile(path, f"cannot be read ({error})") from error
    if [len(layer.tokens) for layer in layers] != experts or any(n < 0 for layer in layers for n in layer.tokens):
        raise DamagedFile(path, "does not count this model's experts")
    counts = np.zeros((len(experts), max(experts, default=0)))
    for row, layer in zip(counts, layers, strict=True):
        row[: len(layer.tokens)] = layer.tokens
    return counts


class ExpertCounts:
    """The counts that runs leave beside a bundle's packed experts, so that the next run loads the most used ones first.

    Adding a run of n tokens first multiplies what is there by 0.5 ** (n / _FADE): recent texts count most. A file that
    cannot be read counts as absent; one that cannot be written is left as it is.
    """

    def __init__(self, folder: Path, experts: Sequence[int]) -> None:
        """`folder`: where this machine's packed experts are; `experts`: how many each layer has."""
        self._folder = folder
        self._experts = experts

    def read(self) -> np.ndarray | None:
        """Counts, float64 [layers, most experts], or None where no run has left any."""
        shape = (len(self._experts), max(self._experts, default=0))
        try:
            counts = np.frombuffer(self._bytes(8 * math.prod(shape) + 1), np.float64)
        except (OSError, ValueError):
            return None
        if counts.size != math.prod(shape):
            return None
        counts = counts.reshape(shape)
        if not np.isfinite(counts).all() or (counts < 0).any():
            return None
        if any(row[count:].any() for row, count in zip(counts, self._experts, strict=True)):
            return None
        return counts

    def add(self, counts: np.ndarray, top_k: int) -> None:
        """Add a run's counts, int [layers, most experts], of tokens with `top_k` experts each."""
        total = counts.astype(np.float64)
        before = self.read()
        if before is not None:
            total += before * 0.5 ** (counts[0].sum() / top_k / _FADE)
        with contextlib.suppress(OSError):
            self._write(total.tobytes())

    def _bytes(self, most: int) -> bytes:
        """The file's first bytes. Raises OSError, also where a link leads elsewhere."""
        with contextlib.ExitStack() as stack:
            folder = self._open(stack)
            fd = os.open(EXPERT_COUNTS, os.O_RDONLY | NO_LINK | NO_WAITING | CLOEXEC, dir_fd=folder)
            return stack.enter_context(open(fd, "rb")).read(most)

    def _write(self, data: bytes) -> None:
        """Put the file in place in one step. Raises OSError, also where a link leads elsewhere."""
        with contextlib.ExitStack() as stack:
            folder = self._open(stack)
            partial = f"uses.{secrets.token_hex(8)}.partial"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK | CLOEXEC
            fd = os.open(partial, flags, 0o600, dir_fd=folder)
            try:
                with open(fd, "wb") as file:
                    file.write(data)
                os.replace(partial, EXPERT_COUNTS, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                os.unlink(partial, dir_fd=folder)
                raise

    def _open(self, stack: contextlib.ExitStack) -> int:
        """A descriptor of the folder, until the stack is left."""
        packed = open_folder(self._folder.parent)
        stack.callback(os.close, packed)
        folder = open_folder(self._folder.name, dir_fd=packed)
        stack.callback(os.close, folder)
        return folder
