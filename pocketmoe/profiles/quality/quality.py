"""What a bundle's answers are worth: perplexity on text, and how far it strays from a reference bundle.

Text is tokenized by the bundle's own tokenizer and cut into windows that do not overlap; each window starts from
nothing, and its first token is not scored. The two bundles walk through a window in lock step (`scoring`), then answer
some prompts by themselves (`free_running`). What each window and prompt came to is all that the figures are made of.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime as ort

from pocketmoe import __version__
from pocketmoe.bundle.files import read_text
from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import BadInput
from pocketmoe.profiles.quality.free_running import (
    ANSWER_TOKENS,
    PROMPT_TOKENS,
    FreeScores,
    answer_both,
    choose_prompts,
)
from pocketmoe.profiles.quality.journal import Journal, Part
from pocketmoe.profiles.quality.models import ReferenceModel
from pocketmoe.profiles.quality.pairs import PairSet, sentences, summarize_pairs
from pocketmoe.profiles.quality.report import (
    Quality,
    QualityReport,
    SliceQuality,
    gap_of_slices,
    levels_of,
    speeds_seen,
    summarize,
    total_bytes,
    touched_bytes,
)
from pocketmoe.profiles.quality.scoring import Scorer, WindowScores, open_engines
from pocketmoe.runtime.engine.memory_plan import CHUNK
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.tokenizer import Text

_PAIRS = -1  # a sentence of a pair, which is of no slice
_OOD_PREFIX = "ood"  # of the names of slices that are marked without being asked for


@dataclass(frozen=True)
class Slice:
    """One kind of text, with figures of its own; `out_of_distribution`: of a kind that calibration did not see."""

    name: str
    text: str
    out_of_distribution: bool = False


class _Text(NamedTuple):
    """A slice in tokens, int64 [n]."""

    tokens: np.ndarray
    bytes_per_token: float


class _Work(NamedTuple):
    """A window of a slice to be scored, or a prompt to be answered."""

    of: int  # the slice's index, or `_PAIRS`
    tokens: np.ndarray  # int64 [n]
    is_prompt: bool


def read_slices(path: Path, out_of_distribution: Collection[str] = ()) -> list[Slice]:
    """A file is one slice; a directory has one for each *.txt in it, by name.

    Slices are marked as out of distribution by name; those whose name begins with "ood" always are.
    Raises BadInput for a path that cannot be read, holds no text, or is not UTF-8, and for a name that no slice has.
    """
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise BadInput(f"{path} has no *.txt files", "Name a text file, or a directory of *.txt files.")
    names = [file.stem for file in files]
    for name in out_of_distribution:
        if name not in names:
            raise BadInput(f"there is no slice {name!r} to be out of distribution", f"There are: {', '.join(names)}.")
    slices: list[Slice] = []
    for file in files:
        marked = file.stem in out_of_distribution or file.stem.startswith(_OOD_PREFIX)
        slices.append(Slice(file.stem, read_text(file, "Name a text file, or a directory of *.txt files."), marked))
    return slices


def evaluate(
    candidate: Bundle,
    slices: Sequence[Slice],
    *,
    reference: Bundle | ReferenceModel | None = None,
    options: EngineOptions | None = None,
    window: int = 512,
    max_tokens: int | None = None,
    free_prompts: int = 0,
    journal: Path | None = None,
    pairs: PairSet | None = None,
    progress: Progress = no_progress,
) -> QualityReport:
    """Score a bundle on text, alone or against a reference.

    The candidate alone leaves out cold experts, or prefers those in memory, where `options` say so.
    window: tokens, less where a model's context is shorter; it replaces the capacity in `options`. max_tokens: of each
    slice, its first ones. free_prompts: taken from the slices in turn and answered by both; none without a reference.
    journal: a file that a killed evaluation goes on from, to the same figures (`journal`). The memory in `options` is
    that of the whole process, both bundles and the logits included; a share of the experts is one of each bundle's, and
    the logits come on top.

    `pairs`: of sentences, which are scored too. `reference`: a bundle, or a model that takes its memory beside ours
    (`pocketmoe.profiles.quality.models`).

    Raises BadInput for a text of fewer than two tokens, for bundles with different vocabularies, for logits that are
    not finite and for a journal of something else; and what opening and running an engine raises.
    """
    options = options or EngineOptions()
    bundles = [candidate, reference] if isinstance(reference, Bundle) else [candidate]
    outside = None if isinstance(reference, Bundle) else reference
    window = min([window, *(bundle.manifest.model.context_length for bundle in bundles)])
    if window < 2:
        raise BadInput(f"windows of {window} tokens leave nothing to score", "Ask for windows of at least 2 tokens.")
    if journal and not options.exact:
        given = "--drop-cold" if options.drop_cold else "--prefer-cached"
        raise BadInput("which experts run depends on what ran before", f"Use --resume without {given}.")
    texts = tokenize(bundles, slices, max_tokens, outside)
    work = _windows(texts, window) + (_prompts(texts, window, free_prompts) if reference else [])
    work += [_Work(_PAIRS, ids, is_prompt=False) for ids in sentences(candidate, pairs, window)] if pairs else []
    options = replace(options, capacity=window)
    with contextlib.ExitStack() as closing:
        key = _journal_key(bundles, slices, window, max_tokens, free_prompts)
        key |= {"reference": outside.about.seal} if outside else {}
        key |= {"pairs": pairs.sha256} if pairs else {}
        notes = closing.enter_context(Journal(journal, key)) if journal else None
        parts, peak_bytes = _compute(bundles, outside, texts, work, options, notes, progress)
    report = _report(bundles, outside, slices, window, [(item, part) for item, part in zip(work, parts, strict=True)])
    if pairs:
        scored = [WindowScores(*part) for item, part in zip(work, parts, strict=True) if item.of == _PAIRS]
        nll, truth = (np.array([getattr(s, name).sum() for s in scored]) for name in ("nll", "reference_nll"))
        report = replace(report, pairs=summarize_pairs(pairs, nll, None if reference is None else truth))
    memory = {"peak_memory_bytes": peak_bytes, "memory_budget_bytes": options.memory.total_bytes}
    return replace(report, seen=replace(report.seen, **memory))


def _windows(texts: Sequence[_Text], window: int) -> list[_Work]:
    return [
        _Work(index, text.tokens[start : start + window], is_prompt=False)
        for index, text in enumerate(texts)
        for start in range(0, len(text.tokens) - 1, window)
    ]


def _prompts(texts: Sequence[_Text], window: int, count: int) -> list[_Work]:
    length = min(PROMPT_TOKENS, window // 2)
    places = choose_prompts([len(text.tokens) for text in texts], count, length)
    return [_Work(index, texts[index].tokens[start : start + length], is_prompt=True) for index, start in places]


def _compute(
    bundles: Sequence[Bundle],
    outside: ReferenceModel | None,
    texts: Sequence[_Text],
    work: Sequence[_Work],
    options: EngineOptions,
    journal: Journal | None,
    progress: Progress,
) -> tuple[list[Part], int]:
    """What each piece of work comes to, WindowScores or FreeScores, and the peak of memory in bytes.

    Those in the journal are not done again.
    """
    parts: list[Part] = [] if journal is None else journal.parts
    left = work[len(parts) :]
    with contextlib.ExitStack() as closing:
        engines = open_engines(bundles, options, progress, closing) if left else []
        models = [*engines, *([outside] if outside else [])]
        scorer = Scorer(models, CHUNK if options.exact else 1)
        for done, item in enumerate(left, len(parts)):
            progress("evaluating", done, len(work))
            if item.is_prompt:
                answer = min(ANSWER_TOKENS, options.capacity - len(item.tokens))
                parts.append(answer_both(models[0], models[1], item.tokens.tolist(), answer))
            else:
                parts.append(scorer.score(item.tokens, 0.0 if item.of == _PAIRS else texts[item.of].bytes_per_token))
            if journal:
                journal.append(parts[-1])
        peak_bytes = max((engine.budget.peak_bytes for engine in engines), default=0)
    progress("evaluating", len(work), len(work))
    return parts, peak_bytes


def _report(
    bundles: Sequence[Bundle],
    outside: ReferenceModel | None,
    slices: Sequence[Slice],
    window: int,
    found: Sequence[tuple[_Work, Part]],
) -> QualityReport:
    compared = len(bundles) == 2 or outside is not None

    def quality(indices: Collection[int]) -> Quality:
        chosen = [(item.is_prompt, part) for item, part in found if item.of in indices]
        windows = [WindowScores(*part) for is_prompt, part in chosen if not is_prompt]
        answers = [FreeScores(*part) for is_prompt, part in chosen if is_prompt]
        return summarize(windows, answers, compared=compared)

    everything = range(len(slices))
    unlike = [index for index in everything if slices[index].out_of_distribution]
    like = [index for index in everything if index not in unlike]
    given = [(item.of, WindowScores(*part)) for item, part in found if not item.is_prompt and item.of != _PAIRS]
    windows = [scores for _, scores in given]
    by_slice = [(piece.name, [s for of, s in given if of == index]) for index, piece in enumerate(slices)]
    touched = touched_bytes(bundles, windows)
    candidate, reference = bundles[0], bundles[1] if len(bundles) == 2 else None
    return QualityReport(
        candidate_sha256=candidate.manifest.sha256,
        candidate_bytes=total_bytes(candidate),
        candidate_touched_bytes_per_token=touched[0],
        candidate_accuracy_levels=levels_of(candidate),
        reference_sha256=reference.manifest.sha256 if reference else outside.about.seal if outside else None,
        reference_bytes=total_bytes(reference) if reference else outside.about.nbytes if outside else None,
        reference_touched_bytes_per_token=touched[1] if reference else None,
        window_tokens=window,
        overall=quality(everything),
        in_distribution=quality(like) if like and unlike else None,
        out_of_distribution=quality(unlike) if like and unlike else None,
        slices=tuple(_slice_quality(piece, quality([index])) for index, piece in enumerate(slices)),
        seen=speeds_seen(windows, [FreeScores(*part) for item, part in found if item.is_prompt]),
        slice_gap=gap_of_slices(by_slice, compared),
    )


def _slice_quality(piece: Slice, quality: Quality) -> SliceQuality:
    data = piece.text.encode()
    digest = hashlib.sha256(data).hexdigest()
    return SliceQuality(piece.name, piece.out_of_distribution, len(data), digest, quality)


def tokenize(
    bundles: Sequence[Bundle], slices: Sequence[Slice], max_tokens: int | None, outside: ReferenceModel | None = None
) -> list[_Text]:
    """Each slice in tokens. Raises BadInput."""
    different = BadInput(
        "the bundles have different vocabularies", "Compare bundles of the same model; bits per byte compare any two."
    )
    sizes = {bundle.manifest.model.vocab_size for bundle in bundles}
    sizes |= {outside.about.vocab_size} if outside else sizes
    if len(sizes) > 1:
        raise different
    tokenizers = [*(Text(bundle) for bundle in bundles), *([outside] if outside else [])]
    if not slices:
        raise BadInput("there is no text to evaluate", "Name a text file, or a directory of *.txt files.")
    result: list[_Text] = []
    for piece in slices:
        ids, *others = [tokenizer.encode(piece.text) if piece.text else [] for tokenizer in tokenizers]
        if any(other != ids for other in others):
            raise different
        kept = np.array(ids[:max_tokens], np.int64)
        if len(kept) < 2:
            raise BadInput(f"{piece.name}: the text has fewer than 2 tokens", "Give more text.")
        result.append(_Text(kept, len(piece.text.encode()) / len(ids)))
    return result


def _journal_key(
    bundles: Sequence[Bundle], slices: Sequence[Slice], window: int, max_tokens: int | None, free_prompts: int
) -> dict[str, object]:
    """Everything that the scores of a window or prompt depend on; threads and memory change none."""
    return {
        "bundles": [bundle.manifest.sha256 for bundle in bundles],
        "texts": [hashlib.sha256(piece.text.encode()).hexdigest() for piece in slices],
        "window": window,
        "max_tokens": max_tokens,
        "free_prompts": free_prompts,
        "versions": [__version__, ort.__version__],
    }
