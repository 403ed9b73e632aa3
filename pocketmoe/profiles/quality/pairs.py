"""Pairs of sentences that differ in the group they speak of: how much more likely one is, and what quantizing changes.

The measure is that of CrowS-Pairs (Nangia et al. 2020, arXiv 2010.00133), with the whole log-likelihood of a model that
reads from left to right. A gap is the mean over pairs of log p(a) - log p(b), in nats; the drift is the candidate's gap
less the reference's, pair by pair. Intervals are by resampling pairs (Efron 1979), the same draws for both models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from pocketmoe.bundle.files import read_whole
from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import BadInput
from pocketmoe.profiles.quality.divergence import Bootstrap, Estimate
from pocketmoe.runtime.tokenizer import Text

_MAX_BYTES = 16 << 20
_MOST = 20_000
_REMEDY = (
    'Write one a line: {"a": "She is a doctor.", "b": "He is a doctor.", "kind": "gender"}; `kind` may be left out.'
)

_Sentence = Annotated[str, msgspec.Meta(min_length=1, max_length=4000)]


class Pair(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The same sentence about two groups. `kind`: what the groups differ in; figures are told for each."""

    a: _Sentence
    b: _Sentence
    kind: Annotated[str, msgspec.Meta(pattern=r"^[\w.+/ -]{1,60}$")] = "pairs"


@dataclass(frozen=True)
class PairSet:
    """The pairs of a file."""

    pairs: tuple[Pair, ...]
    sha256: str

    @property
    def kinds(self) -> list[str]:
        """Each once, in their order."""
        return list(dict.fromkeys(pair.kind for pair in self.pairs))


@dataclass(frozen=True)
class PairQuality:
    """Figures of some pairs, in nats a sentence; those of the reference None without one."""

    kind: str
    pairs: int
    gap_nats: Estimate  # mean of log p(a) - log p(b)
    prefers_a: Estimate  # share of the pairs in which a is likelier
    reference_gap_nats: Estimate | None = None
    drift_nats: Estimate | None = None  # gap less the reference's, paired
    flips: Estimate | None = None  # share of the pairs in which the other sentence became the likelier one


@dataclass(frozen=True)
class PairReport:
    """All pairs, and each kind of them; `sha256`: of the file."""

    sha256: str
    overall: PairQuality
    kinds: tuple[PairQuality, ...]

    @property
    def worst(self) -> PairQuality:
        """The kind whose gap moved most; without a reference the one with the largest gap."""
        return max(self.kinds, key=lambda kind: abs((kind.drift_nats or kind.gap_nats).value))


def read_pairs(path: Path) -> PairSet:
    """A file of JSON lines. Raises BadInput, which names the line."""
    data = read_whole(path, _MAX_BYTES, _REMEDY)
    pairs: list[Pair] = []
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            pairs.append(msgspec.json.decode(line, type=Pair))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadInput(f"{path}, line {number}: no pair ({error})", _REMEDY) from error
        if pairs[-1].a == pairs[-1].b:
            raise BadInput(f"{path}, line {number}: both sentences are the same", _REMEDY)
    if not 1 <= len(pairs) <= _MOST:
        raise BadInput(f"{path} has {len(pairs)} pairs", f"Give 1 to {_MOST}; intervals need some 20. {_REMEDY}")
    return PairSet(tuple(pairs), hashlib.sha256(data).hexdigest())


def sentences(bundle: Bundle, found: PairSet, window: int) -> list[np.ndarray]:
    """The tokens of each sentence, a before b, int64 [n], behind a token that begins or ends texts.

    Without it the first word would count for nothing, and it is often the group's. Raises BadInput for what does not
    fit a window.
    """
    text = Text(bundle)
    ends = bundle.manifest.model.eos_token_ids
    begun = text.encode("a")[0] != text.encode("a", add_special_tokens=False)[0]
    result: list[np.ndarray] = []
    for number, pair in enumerate(found.pairs, 1):
        for sentence in (pair.a, pair.b):
            ids = text.encode(sentence)
            ids = ids if begun or not ends else [ends[0], *ids]
            if not 2 <= len(ids) <= window:
                raise BadInput(f"pair {number} has {len(ids)} tokens", f"Sentences have 1 to {window - 1} tokens here.")
            result.append(np.array(ids, np.int64))
    return result


def summarize_pairs(found: PairSet, nll: np.ndarray, reference_nll: np.ndarray | None) -> PairReport:
    """From the negative log-likelihood of each sentence, a before b, float64 [2 pairs], by one or both models."""
    differences = _differences(nll)
    reference = None if reference_nll is None else _differences(reference_nll)
    kinds = np.array([pair.kind for pair in found.pairs])

    def quality(kind: str, chosen: np.ndarray) -> PairQuality:
        return _quality(kind, differences[chosen], None if reference is None else reference[chosen])

    return PairReport(
        sha256=found.sha256,
        overall=quality("overall", np.ones(len(kinds), bool)),
        kinds=tuple(quality(kind, kinds == kind) for kind in found.kinds),
    )


def _differences(nll: np.ndarray) -> np.ndarray:
    """log p(a) - log p(b) of each pair."""
    return nll[1::2] - nll[0::2]


def _quality(kind: str, differences: np.ndarray, reference: np.ndarray | None) -> PairQuality:
    bootstrap, ones = Bootstrap(len(differences)), np.ones(len(differences))
    found = PairQuality(
        kind=kind,
        pairs=len(differences),
        gap_nats=bootstrap.ratio(differences, ones),
        prefers_a=bootstrap.ratio((differences > 0).astype(float), ones),
    )
    if reference is None:
        return found
    flipped = (differences > 0) != (reference > 0)
    return PairQuality(
        kind=kind,
        pairs=found.pairs,
        gap_nats=found.gap_nats,
        prefers_a=found.prefers_a,
        reference_gap_nats=bootstrap.ratio(reference, ones),
        drift_nats=bootstrap.ratio(differences - reference, ones),
        flips=bootstrap.ratio(flipped.astype(float), ones),
    )


def magnitude(found: Estimate) -> Estimate:
    """How far a figure is from zero, either way, with the interval of that."""
    if found.low is None or found.high is None:
        return Estimate(abs(found.value), None, None)
    ends = sorted((abs(found.low), abs(found.high)))
    return Estimate(abs(found.value), 0.0 if found.low <= 0 <= found.high else ends[0], ends[1])


def worst_drift(kinds: Sequence[PairQuality]) -> tuple[str, Estimate] | None:
    """The kind whose gap moved most, and by how much; None without a reference."""
    moved = [(kind.kind, magnitude(kind.drift_nats)) for kind in kinds if kind.drift_nats is not None]
    return max(moved, key=lambda pair: pair[1].value, default=None)
