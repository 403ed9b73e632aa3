"""The figures of an evaluation as records, made of what each window and each prompt came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pocketmoe.bundle.reader import Bundle
from pocketmoe.profiles.quality.divergence import Bootstrap, Estimate, difference
from pocketmoe.profiles.quality.free_running import FreeRunning, FreeScores, summarize_answers
from pocketmoe.profiles.quality.pairs import PairReport
from pocketmoe.profiles.quality.scoring import WindowScores
from pocketmoe.runtime.backends.onnx_wire import accuracy_levels

_TAIL = 0.99  # of tokens diverge less than the tail figure


@dataclass(frozen=True)
class Divergence:
    """How far a bundle strays from its reference on the same tokens; agreements are shares from 0 to 1."""

    reference_perplexity: Estimate
    perplexity_ratio: Estimate  # candidate / reference, paired
    mean_kl_nats: Estimate  # KL(reference || candidate) of the next token's distribution
    p99_kl_nats: Estimate
    top1_agreement: Estimate
    router_agreement: Estimate | None  # share of a token's experts in common; None where experts do not correspond
    router_agreement_by_layer: tuple[float, ...]


@dataclass(frozen=True)
class Quality:
    """Figures over some windows of text."""

    scored_tokens: int
    windows: int
    perplexity: Estimate
    bits_per_byte: Estimate  # of UTF-8; compares across tokenizers
    divergence: Divergence | None  # None without a reference
    free_running: FreeRunning | None = None  # None without prompts from here


@dataclass(frozen=True)
class SliceQuality:
    """Figures of one slice, and which text it was."""

    name: str
    out_of_distribution: bool
    text_bytes: int
    text_sha256: str
    quality: Quality


@dataclass(frozen=True)
class Seen:
    """Speeds in passing, with two bundles in memory and whatever else the machine did: no benchmark."""

    candidate_tokens_per_s: float  # of given text, in chunks
    candidate_decode_tokens_per_s: float | None  # one at a time; None without free-running
    reference_tokens_per_s: float | None
    peak_memory_bytes: int = 0  # of the process; 0 where all was in a journal
    memory_budget_bytes: int | None = None  # None where none was given in bytes


@dataclass(frozen=True)
class LevelComparison:
    """A greedy answer of `tokens` tokens at the bundle's own accuracy level, against level 0 with the same weights."""

    tokens: int
    same_tokens: float  # share of the places with the same token
    mean_kl_nats: float  # KL(level 0 || own level) along the answer


@dataclass(frozen=True)
class SliceGap:
    """How far the worst slice is from the best: in mean KL with a reference, else in bits per byte."""

    metric: str
    worst: str
    best: str
    gap: Estimate  # each slice resampled by itself


@dataclass(frozen=True)
class QualityReport:
    """What `eval` found; bundles are named by the SHA-256 of their manifests.

    `touched` are the bytes of weights that a token is computed with, mean: all that is dense, of the embedding one row,
    and the experts that it was routed to. Accuracy levels are those of MatMulNBits: 0 computes with
    activations in float32, 4 rounds them to int8; none where nothing is quantized.
    """

    candidate_sha256: str
    candidate_bytes: int
    candidate_touched_bytes_per_token: float
    candidate_accuracy_levels: tuple[int, ...]
    reference_sha256: str | None
    reference_bytes: int | None
    reference_touched_bytes_per_token: float | None
    window_tokens: int
    overall: Quality
    in_distribution: Quality | None  # None unless some slices are out of distribution, as is the next
    out_of_distribution: Quality | None
    slices: tuple[SliceQuality, ...]
    seen: Seen
    levels: LevelComparison | None = None  # None without answers, and where nothing is rounded to int8
    slice_gap: SliceGap | None = None  # None with fewer than two slices
    pairs: PairReport | None = None  # None without pairs of sentences


def summarize(windows: Sequence[WindowScores], answers: Sequence[FreeScores], compared: bool) -> Quality:
    """The figures of some windows, at least one, and of some answers; `compared`: there was a reference."""
    bootstrap = Bootstrap(len(windows))
    counts = np.array([len(window.nll) for window in windows], np.float64)
    nll = np.array([window.nll.sum() for window in windows])
    n_bytes = np.concatenate([window.text_bytes for window in windows])
    return Quality(
        scored_tokens=int(counts.sum()),
        windows=len(windows),
        perplexity=bootstrap.ratio(nll, counts, np.exp),
        bits_per_byte=bootstrap.ratio(nll / np.log(2), n_bytes),
        divergence=_divergence(windows, bootstrap, nll, counts) if compared else None,
        free_running=summarize_answers(answers) if answers else None,
    )


def gap_of_slices(slices: Sequence[tuple[str, Sequence[WindowScores]]], compared: bool) -> SliceGap | None:
    """Of the worst and the best as they came out, which makes the gap a little larger than it is."""
    if len(slices) < 2:
        return None
    sums = {name: _sums(windows, compared) for name, windows in slices}
    ordered = sorted(sums, key=lambda name: float(sums[name][0].sum() / sums[name][1].sum()))
    best, worst = ordered[0], ordered[-1]
    return SliceGap("mean_kl" if compared else "bits_per_byte", worst, best, difference(sums[worst], sums[best]))


def _sums(windows: Sequence[WindowScores], compared: bool) -> tuple[np.ndarray, np.ndarray]:
    """What each window adds above and below the line."""
    if compared:
        return np.array([w.kl.sum() for w in windows]), np.array([len(w.kl) for w in windows], np.float64)
    bits = np.array([w.nll.sum() for w in windows]) / np.log(2)
    return bits, np.concatenate([w.text_bytes for w in windows])


def _divergence(
    windows: Sequence[WindowScores], bootstrap: Bootstrap, nll: np.ndarray, counts: np.ndarray
) -> Divergence:
    reference_nll = np.array([window.reference_nll.sum() for window in windows])
    kl = [window.kl for window in windows]
    window_of = np.repeat(np.arange(len(windows)), [len(part) for part in kl])
    shared = np.stack([window.shared_experts for window in windows])  # [windows, layers]
    by_layer = shared.sum(axis=0) / counts.sum()
    return Divergence(
        reference_perplexity=bootstrap.ratio(reference_nll, counts, np.exp),
        perplexity_ratio=bootstrap.ratio(nll - reference_nll, counts, np.exp),
        mean_kl_nats=bootstrap.ratio(np.array([part.sum() for part in kl]), counts),
        p99_kl_nats=bootstrap.quantile(np.concatenate(kl), window_of, _TAIL),
        top1_agreement=bootstrap.ratio(np.array([window.same_top1.sum() for window in windows]), counts),
        router_agreement=bootstrap.ratio(shared.mean(axis=1), counts) if len(by_layer) else None,
        router_agreement_by_layer=tuple(float(share) for share in by_layer),
    )


def touched_bytes(bundles: Sequence[Bundle], windows: Sequence[WindowScores]) -> list[float]:
    """Bytes of weights that a token is computed with, mean, by bundle."""
    rows = sum(len(window.nll) for window in windows)
    experts = np.sum([window.expert_bytes for window in windows], axis=0)
    result: list[float] = []
    for bundle, expert_bytes in zip(bundles, experts[: len(bundles)], strict=True):
        dense = bundle.manifest.dense
        one_row = (
            sum(tensor.nbytes for tensor in dense if tensor.role == "embedding") / bundle.manifest.model.vocab_size
        )
        result.append(sum(t.nbytes for t in dense if t.role != "embedding") + one_row + float(expert_bytes) / rows)
    return result


def speeds_seen(windows: Sequence[WindowScores], answers: Sequence[FreeScores]) -> Seen:
    """Tokens by the seconds that they took."""
    speeds = sum(len(window.nll) for window in windows) / np.sum([window.seconds for window in windows], axis=0)
    seconds = sum(float(answer.seconds[0]) for answer in answers)
    steps = sum(float(answer.steps[0]) for answer in answers)
    return Seen(
        candidate_tokens_per_s=float(speeds[0]),
        candidate_decode_tokens_per_s=steps / seconds if steps else None,
        reference_tokens_per_s=float(speeds[1]) if len(speeds) == 2 else None,
    )


def levels_of(bundle: Bundle) -> tuple[int, ...]:
    """The accuracy levels of a bundle's quantized products, least first."""
    manifest = bundle.manifest
    graphs = [segment.graph for segment in manifest.segments] + [kind.graph for kind in manifest.expert_kinds]
    return tuple(sorted(set[int]().union(*(accuracy_levels(bundle.path(graph).read_bytes()) for graph in graphs))))


def total_bytes(bundle: Bundle) -> int:
    """What a bundle takes on disk."""
    return sum(entry.nbytes for entry in bundle.manifest.files.values())
