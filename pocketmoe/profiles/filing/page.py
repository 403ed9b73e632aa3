"""The record of an evaluation as one page that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pocketmoe.profiles.filing.columns import (
    ANSWERS,
    COMPARED,
    COMPARED_TASKS,
    GATES,
    GIVEN,
    PAIRS,
    TASKS,
    facts,
    gap_words,
    measured,
    pair_rows,
    scored,
)
from pocketmoe.profiles.filing.record import (
    EvalRecord,
    Evaluated,
    card_with_verdict,
    file_record,
    make_record,
)
from pocketmoe.profiles.quality.evaluation import EvalRequest
from pocketmoe.profiles.quality.gate import Verdict
from pocketmoe.profiles.quality.models import ReferenceInfo
from pocketmoe.profiles.quality.report import QualityReport
from pocketmoe.profiles.quality.tasks import TaskFigure
from pocketmoe.profiles.report.charts import Axis, bar_chart
from pocketmoe.profiles.report.columns import as_markup
from pocketmoe.profiles.report.html import Markup, el, figure, page, table
from pocketmoe.sizes import in_words


def file_evaluation(
    bundle: Path,
    request: EvalRequest,
    report: QualityReport,
    verdicts: Sequence[Verdict],
    directory: Path,
    checkpoint: ReferenceInfo | None = None,
    tasks: Sequence[TaskFigure] = (),
) -> None:
    """Record, page and model card of an evaluation that has just been made, in `directory`.

    `checkpoint`: the reference, where that is one. Raises OutputError, and DamagedFile where the bundle is gone.
    """
    record = make_record(bundle, request, report, verdicts, checkpoint, tasks)
    file_record(record, directory, render(record), card_with_verdict(bundle, record))


def render(record: EvalRecord) -> str:
    """The page."""
    rows = scored(record.report)
    compared = record.report.overall.divergence is not None
    shown = as_markup(COMPARED if compared else GIVEN, rows)
    body = [
        *_head(record),
        *_gates(record),
        el("section", el("h2", "Given text"), el("p", _words(compared), class_="soft"), shown),
        *_by_slice(record),
        *_pairs(record),
        *_tasks(record),
        *_answers(record),
        _about(record),
        el("section", el("h2", "What was compared"), _bundles(record)),
        _texts(record),
    ]
    return page(f"Evaluation of {_name(record.candidate)}", body)


def _head(record: EvalRecord) -> Iterator[Markup]:
    failed = [verdict for verdict in record.verdicts if not verdict.passed]
    yield el("h1", f"{_name(record.candidate)}: {'passed' if record.passed else 'FAILED'}")
    yield el("p", _verdict_words(record, len(failed)), class_="warn" if failed else None)
    if failed:
        said = (el("li", el("b", found.rule), f": {measured(found)} in {found.scope}") for found in failed)
        yield el("ul", *said)
    tiles = [(f"{record.report.overall.perplexity.value:.2f}", "perplexity of all the text")]
    if found := record.report.overall.divergence:
        tiles += [
            (f"{found.perplexity_ratio.value - 1:+.2%}", "perplexity against the reference"),
            (f"{found.mean_kl_nats.value:.4f}", "mean KL from the reference, nats a token"),
            (f"{found.top1_agreement.value:.1%}", "of tokens with the same likeliest next one"),
        ]
    tiles.append((in_words(record.candidate.nbytes), _smaller(record)))
    yield el("ul", *(el("li", el("b", value), what) for value, what in tiles), class_="tiles")


def _verdict_words(record: EvalRecord, failed: int) -> str:
    compared = f" against {_name(record.reference)}" if record.reference else ""
    gates = f"{len(record.verdicts) - failed} of {len(record.verdicts)} gates hold" if record.verdicts else "no gates"
    return (
        f"{record.candidate.architecture}, experts in {_experts(record.candidate)}{compared}: {gates}. "
        f"{record.report.overall.scored_tokens} tokens of text in {len(record.report.slices)} slices, "
        f"{record.made_at[:16].replace('T', ' ')} UTC."
    )


def _name(found: Evaluated) -> str:
    """Its directory's name, and where its weights come from."""
    name = Path(found.path).resolve().name
    return name if name == found.source else f"{name} ({found.source})"


def _experts(found: Evaluated) -> str:
    return ", ".join(sorted({value for key, value in found.schemes.items() if key.startswith("experts")}))


def _smaller(record: EvalRecord) -> str:
    if record.reference is None:
        return "on disk"
    return f"on disk, {record.candidate.nbytes / record.reference.nbytes:.0%} of the reference's"


def _words(compared: bool) -> str:
    words = "Intervals hold with 95%, by resampling windows of text. "
    more = "KL: by how many nats the next token's distribution strays from the reference's; router: experts in common."
    return words + (more if compared else "")


def _gates(record: EvalRecord) -> Iterator[Markup]:
    if record.verdicts:
        ordered = sorted(record.verdicts, key=lambda verdict: verdict.passed)
        yield el("section", el("h2", "Gates"), as_markup(GATES, ordered))


def _by_slice(record: EvalRecord) -> Iterator[Markup]:
    """Which slices lose most: the worst one, and how far it is from the best."""
    slices = [(s.name, s.quality.divergence) for s in record.report.slices if s.quality.divergence]
    if len(slices) < 2:
        return
    ordered = sorted(slices, key=lambda found: -found[1].mean_kl_nats.value)
    bars = [(name, [found.mean_kl_nats.value]) for name, found in ordered]
    chart = bar_chart(bars, [("mean KL", "a")], Axis("nats a token"), "Loss by kind of text")
    said = gap_words(record.report.slice_gap) if record.report.slice_gap else ""
    words = f"{said[:1].upper()}{said[1:]}. Each is resampled by itself; being picked as extremes widens it a little."
    numbers = table(
        ("text", "mean KL", "low", "high"),
        [
            (name, *(_number(value) for value in (f.mean_kl_nats.value, f.mean_kl_nats.low, f.mean_kl_nats.high)))
            for name, f in ordered
        ],
    )
    yield figure("Which texts lose most", chart, words, numbers)


def _pairs(record: EvalRecord) -> Iterator[Markup]:
    """Whether what is said of one group became likelier than the same said of the other."""
    rows, pairs = pair_rows(record.report), record.report.pairs
    if pairs is None:
        return
    words = (
        "The same sentence about two groups, a and b. Gap: mean of log p(a) - log p(b), in nats a sentence; drift: the "
        "gap less the reference's, pair by pair; flipped: pairs in which the other sentence became the likelier one. "
        f"After CrowS-Pairs (Nangia et al. 2020). SHA-256 of the pairs: {pairs.sha256}."
    )
    said: list[Markup] = []
    if pairs.worst.drift_nats:
        drift = pairs.worst.drift_nats.value
        said.append(el("p", f"The gap moved most for {pairs.worst.kind}: by {drift:+.4f} nats a sentence."))
    shown = el("p", words, class_="soft words")
    yield el("section", el("h2", "Groups"), *said, as_markup(PAIRS, rows), shown)


def _tasks(record: EvalRecord) -> Iterator[Markup]:
    """Figures of lm-evaluation-harness."""
    if record.tasks:
        compared = any(found.reference is not None for found in record.tasks)
        words = "Figures as the harness computes them, with its standard errors."
        if compared:
            words += " Change: less the reference's; its 95% interval is of the differences example by example."
        shown = as_markup(COMPARED_TASKS if compared else TASKS, record.tasks)
        yield el("section", el("h2", "Tasks of lm-evaluation-harness"), el("p", words, class_="soft"), shown)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"


def _answers(record: EvalRecord) -> Iterator[Markup]:
    rows = [row for row in scored(record.report) if row.quality.free_running]
    if rows:
        words = "Both bundles answer prompts greedily; same: tokens of the answers that are the reference's."
        yield el("section", el("h2", "Answers"), el("p", words, class_="soft"), as_markup(ANSWERS, rows))


def _about(record: EvalRecord) -> Markup:
    lines = [*facts(record.report), *(f"{name} {version}" for name, version in record.versions.items())]
    machine = record.machine
    lines.append(
        f"{machine['cpu']} ({machine['architecture']}), {machine['cores']} cores, "
        f"{in_words(machine['memory_bytes'])} of memory, {machine['system']}"
    )
    given = (f"{name} {value}" for name, value in record.options.items() if value not in (None, (), [], 0.0))
    lines.append(f"options: {', '.join(given)}")
    gate = record.gate
    if gate:
        lines.append(f"gate file {gate.path}, SHA-256 {gate.sha256}")
    shown = el("details", el("summary", "The gate file"), el("pre", gate.text)) if gate else ""
    return el("section", el("h2", "How it was made"), el("ul", *(el("li", line) for line in lines)), shown)


def _bundles(record: EvalRecord) -> Markup:
    found = [bundle for bundle in (record.candidate, record.reference) if bundle]
    lines: Sequence[tuple[str, Callable[[Evaluated], str]]] = (
        ("path", lambda bundle: bundle.path),
        ("seal", lambda bundle: bundle.seal),
        ("source", lambda bundle: bundle.source + (f" @ {bundle.revision}" if bundle.revision else "")),
        ("licence", lambda bundle: bundle.licence or "not stated"),
        ("stored as", lambda bundle: "; ".join(f"{part} {scheme}" for part, scheme in bundle.schemes.items())),
        ("made by", lambda bundle: "; ".join(bundle.steps)),
    )
    head = ("", "candidate", "reference")[: 1 + len(found)]
    return el("div", table(head, [(name, *map(cell, found)) for name, cell in lines]), class_="words")


def _texts(record: EvalRecord) -> Markup:
    rows = [(s.name, str(s.text_bytes), s.text_sha256) for s in record.report.slices]
    return el("section", el("h2", "Texts"), el("div", table(("text", "bytes", "SHA-256"), rows), class_="words"))
