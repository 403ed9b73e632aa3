"""What a bundle's answers are worth: perplexity on text, and how far it strays from a reference bundle.

Text is tokenized by the bundle's own tokenizer and cut into windows that do not overlap; each window starts from
nothing, and its first token is not scored. The two bundles walk through a window in lock step, a chunk of it at a time,
so that memory holds the logits of one chunk whatever the length of the text.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pocketmoe.bundle import Bundle, Progress, no_progress
from pocketmoe.errors import BadInput, BudgetTooSmall
from pocketmoe.profiles.divergence import (
    Bootstrap,
    Estimate,
    RowScores,
    compare_rows,
    negative_log_likelihood,
    shared_share,
)
from pocketmoe.runtime.budget import available_bytes, process_bytes
from pocketmoe.runtime.engine import CHUNK, Engine, EngineOptions
from pocketmoe.runtime.fitting import MemoryRequest
from pocketmoe.runtime.text import Text

_TAIL = 0.99  # of tokens diverge less than the tail figure
_DEFAULT_SHARE = 0.8  # of the memory that is free, where no budget is given
_NOT_YET_USED = ("expert slots", "activations", "slot scratch")  # claims of an engine that has just been opened


@dataclass(frozen=True)
class Slice:
    """One kind of text, with figures of its own."""

    name: str
    text: str


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


@dataclass(frozen=True)
class SliceQuality:
    """Figures of one slice, and which text it was."""

    name: str
    text_bytes: int
    text_sha256: str
    quality: Quality


@dataclass(frozen=True)
class QualityReport:
    """What `eval` found; bundles are named by the SHA-256 of their manifests."""

    candidate_sha256: str
    candidate_bytes: int
    reference_sha256: str | None
    reference_bytes: int | None
    window_tokens: int
    overall: Quality
    slices: tuple[SliceQuality, ...]


@dataclass(frozen=True)
class _Window:
    """The scores of one window's tokens but the first."""

    n_bytes: float  # of text, by the slice's mean bytes per token
    rows: RowScores
    shared_experts: np.ndarray  # [layers], sum over rows of the share in common; empty where it cannot be told


def read_slices(path: Path) -> list[Slice]:
    """A file is one slice; a directory has one for each *.txt in it, by name.

    Raises BadInput for a path that cannot be read, holds no text, or is not UTF-8.
    """
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise BadInput(f"{path} has no *.txt files", "Name a text file, or a directory of *.txt files.")
    slices = []
    for file in files:
        try:
            slices.append(Slice(file.stem, file.read_bytes().decode("utf-8")))
        except OSError as error:
            raise BadInput(f"{file} cannot be read ({error.strerror})", "Name a text file.") from error
        except UnicodeDecodeError as error:
            raise BadInput(f"{file} is not UTF-8 text (byte {error.start})", "Convert it to UTF-8.") from error
    return slices


def evaluate(
    candidate: Bundle,
    slices: Sequence[Slice],
    *,
    reference: Bundle | None = None,
    options: EngineOptions | None = None,
    window: int = 512,
    max_tokens: int | None = None,
    progress: Progress = no_progress,
) -> QualityReport:
    """Score a bundle on text, alone or against a reference.

    The candidate alone leaves out cold experts where `options` say so.
    window: tokens, less where a model's context is shorter; it replaces the capacity in `options`. max_tokens: of each
    slice, its first ones. The memory in `options` is that of the whole process, both bundles and the logits included;
    a share of the experts is one of each bundle's, and the logits come on top.

    Raises BadInput for a text of fewer than two tokens, for bundles with different vocabularies and for logits that
    are not finite; and what opening and running an engine raises.
    """
    bundles = [candidate] if reference is None else [candidate, reference]
    window = min([window, *(bundle.manifest.model.context_length for bundle in bundles)])
    if window < 2:
        raise BadInput(f"windows of {window} tokens leave nothing to score", "Ask for windows of at least 2 tokens.")
    texts = _tokenize(bundles, slices, max_tokens)
    found: list[list[_Window]] = [[] for _ in slices]
    done, total = 0, sum(len(range(0, len(tokens) - 1, window)) for tokens, _ in texts)
    with contextlib.ExitStack() as closing:
        engines = _open(bundles, replace(options or EngineOptions(), capacity=window), progress, closing)
        scorer = _Scorer(engines, 1 if options and options.drop_cold else CHUNK)
        for index, (tokens, bytes_per_token) in enumerate(texts):
            for start in range(0, len(tokens) - 1, window):
                progress("evaluating", done, total)
                found[index].append(scorer.score(tokens[start : start + window], bytes_per_token))
                done += 1
        progress("evaluating", total, total)
    return QualityReport(
        candidate_sha256=candidate.manifest.sha256,
        candidate_bytes=_total_bytes(candidate),
        reference_sha256=reference.manifest.sha256 if reference else None,
        reference_bytes=_total_bytes(reference) if reference else None,
        window_tokens=window,
        overall=_summarize([scores for windows in found for scores in windows], reference is not None),
        slices=tuple(
            _slice_quality(piece, _summarize(windows, reference is not None))
            for piece, windows in zip(slices, found, strict=True)
        ),
    )


def _summarize(windows: Sequence[_Window], compared: bool) -> Quality:
    """The figures of some windows, at least one; `compared`: there was a reference."""
    bootstrap = Bootstrap(len(windows))
    counts = np.array([len(window.rows.nll) for window in windows], np.float64)
    nll = np.array([window.rows.nll.sum() for window in windows])
    n_bytes = np.array([window.n_bytes for window in windows])
    return Quality(
        scored_tokens=int(counts.sum()),
        windows=len(windows),
        perplexity=bootstrap.ratio(nll, counts, np.exp),
        bits_per_byte=bootstrap.ratio(nll / np.log(2), n_bytes),
        divergence=_divergence(windows, bootstrap, nll, counts) if compared else None,
    )


def _divergence(windows: Sequence[_Window], bootstrap: Bootstrap, nll: np.ndarray, counts: np.ndarray) -> Divergence:
    reference_nll = np.array([window.rows.reference_nll.sum() for window in windows])
    kl = [window.rows.kl for window in windows]
    window_of = np.repeat(np.arange(len(windows)), [len(part) for part in kl])
    shared = np.stack([window.shared_experts for window in windows])  # [windows, layers]
    by_layer = shared.sum(axis=0) / counts.sum()
    return Divergence(
        reference_perplexity=bootstrap.ratio(reference_nll, counts, np.exp),
        perplexity_ratio=bootstrap.ratio(nll - reference_nll, counts, np.exp),
        mean_kl_nats=bootstrap.ratio(np.array([part.sum() for part in kl]), counts),
        p99_kl_nats=bootstrap.quantile(np.concatenate(kl), window_of, _TAIL),
        top1_agreement=bootstrap.ratio(np.array([window.rows.same_top1.sum() for window in windows]), counts),
        router_agreement=bootstrap.ratio(shared.mean(axis=1), counts) if len(by_layer) else None,
        router_agreement_by_layer=tuple(float(share) for share in by_layer),
    )


class _Scorer:
    """One or two engines in lock step: the candidate, and the reference where there is one."""

    def __init__(self, engines: Sequence[Engine], step: int) -> None:
        """`step`: tokens fed at a time. What --drop-cold leaves out is what decoding would, one token at a time."""
        self._engines = engines
        self._step = step
        self._routes: list[list[np.ndarray]] = [[] for _ in engines]  # of the current chunk, by layer
        layers = [[layer.n_experts for layer in engine.bundle.manifest.moe_layers] for engine in engines]
        if len(engines) == 2 and layers[0] == layers[1]:
            for engine, routes in zip(engines, self._routes, strict=True):
                engine.on_routes = lambda _layer, ids, routes=routes: routes.append(ids.copy())

    def score(self, tokens: np.ndarray, bytes_per_token: float) -> _Window:
        """Score one window, int64 [n], n >= 2."""
        targets = tokens[1:]
        parts: list[RowScores] = []
        shared: list[np.ndarray] = []
        for engine in self._engines:
            engine.reset()
        for start in range(0, len(targets), self._step):
            wanted = targets[start : start + self._step]
            rows, shares = self._score_chunk(tokens[start : start + len(wanted)], wanted)
            parts.append(rows)
            shared.append(shares)
        return _Window(
            n_bytes=bytes_per_token * len(targets),
            rows=RowScores(*(np.concatenate(column) for column in zip(*parts, strict=True))),
            shared_experts=np.sum(shared, axis=0),
        )

    def _score_chunk(self, tokens: np.ndarray, targets: np.ndarray) -> tuple[RowScores, np.ndarray]:
        for routes in self._routes:
            routes.clear()
        logits = [_finite(engine, engine.feed(tokens.tolist(), rows="all")) for engine in self._engines]
        if len(logits) == 1:
            nll = negative_log_likelihood(logits[0], targets)
            nothing = np.empty(0)
            return RowScores(nll, nothing, nothing, nothing.astype(bool)), nothing
        layers = zip(self._routes[1], self._routes[0], strict=True)
        shares = [shared_share(ours, theirs).sum() for ours, theirs in layers]
        return compare_rows(logits[0], logits[1], targets), np.array(shares)


def _finite(engine: Engine, logits: np.ndarray) -> np.ndarray:
    """Logits as they are; minus infinity rules a token out, anything else that is not a number is an error."""
    if not np.isfinite(logits.max(axis=1)).all():
        raise BadInput(f"{engine.bundle.root}: the model gives logits that are not finite", "Export it again.")
    return logits


def _tokenize(
    bundles: Sequence[Bundle], slices: Sequence[Slice], max_tokens: int | None
) -> list[tuple[np.ndarray, float]]:
    """Each slice's token ids, int64 [n], and its bytes per token. Raises BadInput."""
    different = BadInput(
        "the bundles have different vocabularies", "Compare bundles of the same model; bits per byte compare any two."
    )
    if len({bundle.manifest.model.vocab_size for bundle in bundles}) > 1:
        raise different
    tokenizers = [Text(bundle) for bundle in bundles]
    if not slices:
        raise BadInput("there is no text to evaluate", "Name a text file, or a directory of *.txt files.")
    result = []
    for piece in slices:
        ids, *others = [tokenizer.encode(piece.text) if piece.text else [] for tokenizer in tokenizers]
        if any(other != ids for other in others):
            raise different
        kept = np.array(ids[:max_tokens], np.int64)
        if len(kept) < 2:
            raise BadInput(f"{piece.name}: the text has fewer than 2 tokens", "Give more text.")
        result.append((kept, len(piece.text.encode()) / len(ids)))
    return result


def _open(
    bundles: Sequence[Bundle], options: EngineOptions, progress: Progress, closing: contextlib.ExitStack
) -> list[Engine]:
    """An engine for each bundle, all within one budget: of what is free, each of those yet to come gets the same share.

    Raises BudgetTooSmall, with the least that would do for all as far as it is known by then.
    """
    memory = options.memory
    exact = replace(options, drop_cold=0)
    if memory.expert_share is not None:
        return [
            closing.enter_context(Engine(bundle, exact if index else options, progress))
            for index, bundle in enumerate(bundles)
        ]
    total = memory.total_bytes or process_bytes() + int(_DEFAULT_SHARE * available_bytes())
    promised = _logits_bytes(bundles)
    engines: list[Engine] = []
    for index, bundle in enumerate(bundles):
        used = process_bytes()
        room = max(0, total - promised - used) // (len(bundles) - index)
        mine = replace(
            options, memory=MemoryRequest(total_bytes=used + room), drop_cold=options.drop_cold if index == 0 else 0
        )
        try:
            engine = closing.enter_context(Engine(bundle, mine, progress))
        except BudgetTooSmall as error:
            least = used + promised + (error.least_bytes - used) * (len(bundles) - index)
            raise BudgetTooSmall(total, least) from error
        promised += sum(engine.budget.claims.get(name, 0) for name in _NOT_YET_USED)
        engines.append(engine)
    return engines


def _logits_bytes(bundles: Sequence[Bundle]) -> int:
    """Logits of one chunk for every bundle: as the graph gives them, while they are joined, and the largest copies."""
    return 4 * CHUNK * (2 + len(bundles)) * bundles[0].manifest.model.vocab_size + (48 << 20)


def _slice_quality(piece: Slice, quality: Quality) -> SliceQuality:
    data = piece.text.encode()
    return SliceQuality(piece.name, len(data), hashlib.sha256(data).hexdigest(), quality)


def _total_bytes(bundle: Bundle) -> int:
    return sum(entry.nbytes for entry in bundle.manifest.files.values())
