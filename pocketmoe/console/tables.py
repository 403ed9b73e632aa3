"""Reports as aligned text, for people; `--json` has the same records for programs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pocketmoe.profiles.report.columns import aligned, as_text
from pocketmoe.sizes import in_words, peak_in_words

if TYPE_CHECKING:
    from pocketmoe.bundle.inspection import Inspection
    from pocketmoe.bundle.packed import PackedListing
    from pocketmoe.profiles.compare.records import Comparison
    from pocketmoe.profiles.machine.doctor import DoctorReport
    from pocketmoe.profiles.quality.gate import Verdict
    from pocketmoe.profiles.quality.report import QualityReport
    from pocketmoe.profiles.quality.tasks import TaskFigure
    from pocketmoe.profiles.routing.replay import BudgetResult, PolicyResult, ReplayReport
    from pocketmoe.runtime.generate import RunReport
    from pocketmoe.runtime.prefix_cache.listing import Listing

_Rows = Sequence[tuple[str, str]]
_MOST_OFFERS = 5  # of a kind, on a terminal


def run_table(report: RunReport) -> str:
    """What a run took."""
    decode = f"{report.decode_tokens_per_s:.1f}" if report.decode_tokens_per_s else "-"
    hits = f"{report.expert_hit_rate:.0%}" if report.expert_hit_rate is not None else "-"
    backend = report.backend + (f" ({report.backend_reason})" if report.backend_reason else "")
    if report.prefetch_hit_rate:
        hits += f" and {report.prefetch_hit_rate:.0%} by prefetching"
    few = report.expert_slots < report.experts_per_token
    short = f", fewer than the {report.experts_per_token} of one token" if few else ""
    return _aligned(
        [
            ("memory", f"{_measured(report)} at most, of {in_words(report.memory_budget_bytes)}"),
            ("tokens/s", f"{decode} (first token after {report.ttft_s:.2f} s, ready after {report.start_s:.2f} s)"),
            ("hit rate", f"{hits} (room for {report.expert_slots} of {report.experts} experts{short})"),
            ("bytes read", in_words(report.bytes_read)),
            *_inexact_rows(report),
            *_step_rows(report),
            ("backend", f"{backend}, {report.threads} threads"),
            *([("caches", _copied(report))] if report.caches_copied else []),
        ]
    )


def _measured(report: RunReport) -> str:
    """The peak, and how it is known where that is not exact."""
    how = " (resident set)" if report.memory_measured_by == "resident set" else ""
    return peak_in_words(report.peak_memory_bytes) + how


def run_line(report: RunReport) -> str:
    """The same in a line, with one more for each thing that is not as it should be."""
    decode = f"{report.decode_tokens_per_s:.1f}" if report.decode_tokens_per_s else "-"
    hits = f"{report.expert_hit_rate:.0%}" if report.expert_hit_rate is not None else "-"
    odd = [f"{what} {text}" for what, text in _inexact_rows(report)]
    if report.stop_reason == "context":
        odd.append("stopped: the model's context is full")
    if report.backend_reason:
        odd.append(f"backend {report.backend}: {report.backend_reason}")
    if report.caches_copied:
        odd.append(f"caches {_copied(report)}: a token takes the longer the longer the text is")
    line = (
        f"[{decode} tokens/s, first after {report.start_s + report.ttft_s:.1f} s, hits {hits}, memory "
        f"{peak_in_words(report.peak_memory_bytes)} of {in_words(report.memory_budget_bytes)}]"
    )
    return "\n".join([line, *odd])


def _copied(report: RunReport) -> str:
    return f"copied at each token in {report.caches_copied} of {report.caches}"


def _inexact_rows(report: RunReport) -> _Rows:
    changes = [
        ("left out", report.dropped_weight_share, "the router's weight", "--drop-cold"),
        ("replaced", report.replaced_choices_share, "the router's choices", "--prefer-cached"),
    ]
    return [
        (what, f"{share:.1%} of {whole}: not the model's own answer; eval {option} measures what that costs")
        for what, share, whole, option in changes
        if share
    ]


def _step_rows(report: RunReport) -> _Rows:
    step = report.step
    if step is None:
        return []
    parts = f"attention and head {step.segments:.0%}, experts {step.experts:.0%}, waiting for them {step.waiting:.0%}"
    return [
        ("per token", f"{1000 * step.mean_s:.1f} ms: {parts}, Python {step.python:.0%}"),
        ("page faults", f"{report.major_faults} from disk while decoding"),
    ]


def inspection_table(found: Inspection) -> str:
    """What is in a bundle."""
    experts = _range(found.experts_per_layer)
    rows = [
        ("model", f"{found.architecture} ({found.model_type}), {found.parameters / 1e6:.1f} million parameters"),
        ("experts", f"{experts} in each of {found.moe_layers} layers, {_range(found.experts_per_token)} per token"),
        ("context", f"{found.context_length} tokens, vocabulary {found.vocab_size}, hidden size {found.hidden_size}"),
        ("bytes", f"{in_words(found.total_bytes)} in {found.files} files, experts {in_words(found.expert_bytes)}"),
        *((f"  {role}", in_words(nbytes)) for role, nbytes in sorted(found.dense_bytes_by_role.items())),
        ("caches", f"{in_words(found.state_bytes_per_token)} for each token of text"),
        *(("scheme", f"{what}: {scheme}") for what, scheme in found.schemes.items()),
        *_source_rows(found.provenance),
        *([("equivalence", found.equivalence)] if found.equivalence else []),
        *(("made by", step) for step in found.provenance["steps"]),
        *(("note", note) for note in found.notes),
    ]
    return _aligned(rows)


def _source_rows(source: dict[str, Any]) -> _Rows:
    """Where the weights come from, and on what terms."""
    licence = " ".join(source[part] for part in ("licence", "licence_name", "licence_link") if source[part])
    at = f" at {source['revision']}" if source["revision"] else ""
    rows = [("source", f"{source['source']}{at}"), ("licence", licence or "not stated")]
    rows += [(name, source[key]) for name, key in (("base model", "base_model"), ("origin", "origin")) if source[key]]
    return rows + ([("datasets", ", ".join(source["datasets"]))] if source["datasets"] else [])


def quality_table(report: QualityReport) -> str:
    """How well a bundle predicts text, a row for each slice, and how far it is from its reference."""
    from pocketmoe.profiles.filing.columns import ANSWERS, COMPARED, GIVEN, PAIRS, facts, pair_rows, scored

    rows = scored(report)
    lines = as_text(COMPARED if report.overall.divergence else GIVEN, rows)
    answered = [row for row in rows if row.quality.free_running]
    if answered:
        lines += ["", *as_text(ANSWERS, answered)]
    if report.pairs:
        lines += ["", *as_text(PAIRS, pair_rows(report))]
    return "\n".join([*lines, "", *facts(report)])


def task_table(figures: Sequence[TaskFigure]) -> str:
    """A row for each metric of a task."""
    from pocketmoe.profiles.filing.columns import COMPARED_TASKS, TASKS

    compared = any(figure.reference is not None for figure in figures)
    return "\n".join(as_text(COMPARED_TASKS if compared else TASKS, figures)) if figures else ""


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """A row for each limit, those that do not hold first."""
    from pocketmoe.profiles.filing.columns import GATES

    return "\n".join(as_text(GATES, sorted(verdicts, key=lambda verdict: verdict.passed))) if verdicts else ""


def replay_table(report: ReplayReport) -> str:
    """Hits and bytes of each policy, a block for each budget."""
    prompt = f", {report.prompt_tokens} of them the prompt" if report.prompt_tokens else ""
    blocks = [
        f"{report.tokens} tokens{prompt}; {report.experts} experts in {report.moe_layers} layers, "
        f"{report.experts_per_token} of them for each token",
        f"sizes {report.sizes}" if report.sizes else "sizes of experts unknown: give --bundle to see bytes",
    ]
    if all(len(budget.policies) == 1 for budget in report.budgets):
        warnings = [f"Warning: {budget.memory}: {text}." for budget in report.budgets for text in budget.warnings]
        blocks.append(f"policy {report.budgets[0].policies[0].policy}")
        return "\n".join([*blocks, *warnings, *aligned(_budget_rows(report.budgets))])
    rows = [["policy", "hits", "2nd half", "to belady", "misses/token", "median", "p95", "read/token"]]
    rows += [_replay_row(result) for budget in report.budgets for result in budget.policies]
    head, *lines = aligned(rows)
    for budget in report.budgets:
        body, lines = lines[: len(budget.policies)], lines[len(budget.policies) :]
        warnings = [f"Warning: {warning}." for warning in budget.warnings]
        blocks += ["", _budget_line(budget), *warnings, head, *body]
    return "\n".join(blocks)


def _budget_rows(budgets: Sequence[BudgetResult]) -> list[list[str]]:
    """A budget a row, where there is one policy."""
    rows = [["memory", "slots", "of experts", "in all", "hits", "to belady", "misses/token", "read/token"]]
    for budget in budgets:
        _, hits, _, behind, misses, _, _, read = _replay_row(budget.policies[0])
        total = in_words(budget.total_bytes) if budget.total_bytes is not None else "-"
        rows.append([budget.memory, str(budget.slots), f"{budget.expert_share:.1%}", total, hits, behind, misses, read])
    return rows


def _budget_line(budget: BudgetResult) -> str:
    total = f", {in_words(budget.total_bytes)} in all" if budget.total_bytes is not None else ""
    return f"{budget.memory}: {budget.slots} slots, {budget.expert_share:.1%} of the experts{total}"


def _replay_row(result: PolicyResult) -> list[str]:
    return [
        result.policy,
        f"{result.hit_rate:.1%}" if result.hit_rate is not None else "-",
        f"{result.second_half_hit_rate:.1%}",
        f"{result.behind_belady:.1%}" if result.behind_belady is not None else "-",
        f"{result.misses_per_token:.1f}",
        f"{result.misses_per_token_median:.0f}",
        f"{result.misses_per_token_p95:.0f}",
        in_words(result.bytes_per_token) if result.bytes_per_token is not None else "-",
    ]


def doctor_table(report: DoctorReport, advice: Sequence[str]) -> str:
    """What this machine has, and what that means."""
    cpu, memory = report.cpu, report.memory
    busy = " (busy)" if report.load.is_busy else ""
    quota = f", a quota of {cpu.quota_cores:g}" if cpu.quota_cores is not None else ""
    limit = f", a cgroup limits to {in_words(memory.cgroup_limit_bytes)}" if memory.cgroup_limit_bytes else ""
    rows = [
        ("cpu", f"{cpu.model}, {cpu.cores} cores{quota} ({', '.join(cpu.features)})"),
        ("memory", f"{in_words(memory.total_bytes)}, {in_words(memory.available_bytes)} available{limit}"),
        ("for slots", f"{in_words(memory.shared_free_bytes)} free of {in_words(memory.shared_total_bytes)}"),
        *_limit_rows(report),
        ("read memory", f"{report.ram.one_thread_bytes_per_s / 1e9:.1f} GB/s with one thread{busy}"),
        ("", f"{report.ram.all_threads_bytes_per_s / 1e9:.1f} GB/s with {report.ram.threads}{busy}"),
        *_disk_rows(report),
        *_computing_rows(report),
        ("slots", "work" if report.slots_work else f"do not work: {report.slots_problem}"),
        ("software", f"Python {report.software.python}, onnxruntime {report.software.onnxruntime}"),
        ("providers", ", ".join(report.software.providers)),
    ]
    return "\n".join([_aligned(rows), "", *advice])


def _limit_rows(report: DoctorReport) -> Iterator[tuple[str, str]]:
    limits, lock = report.limits, report.memory.lock_limit_bytes
    files = f"{limits.open_files:,}" if limits.open_files is not None else "no limit"
    hard = f", up to {limits.open_files_hard:,} where asked for" if limits.open_files_hard is not None else ""
    yield "open files", f"{files}{hard}; experts keep none open"
    yield "memory maps", f"{limits.maps:,}, slots for about {report.most_experts:,} experts"
    yield "locked memory", "no limit" if lock is None else f"{in_words(lock)}; weights beyond may be swapped out"


def prefix_cache_table(found: Listing) -> str:
    """What a prefix cache holds, a row for each model; or that it was removed."""
    total = f"{found.files} files, {in_words(found.nbytes)}"
    if found.cleared:
        return f"Removed {total} from {found.directory}."
    rows = [["model", "files", "size", "longest text", "last used"]]
    rows += [
        [part.model, str(part.files), in_words(part.nbytes), f"{part.longest_tokens} tokens", part.last_used]
        for part in found.models
    ]
    return "\n".join([*(aligned(rows) if found.models else []), f"{found.directory}: {total}"])


def packed_table(found: PackedListing) -> str:
    """What is packed outside of bundles, a row for each; or that it was removed."""
    total = in_words(found.nbytes)
    if found.cleared:
        return f"Removed {total} from {found.directory}."
    rows = [["bundle", "size", "is there", "folder"]]
    rows += [
        [part.bundle, in_words(part.nbytes), "yes" if part.is_there else "no", part.seal] for part in found.bundles
    ]
    end = f"{found.directory}: {total}, {in_words(found.free_bytes)} free"
    return "\n".join([*(aligned(rows) if found.bundles else []), end])


def comparison_table(found: Comparison) -> str:
    """The way it comes out, the offers that matter, and everything that was assumed."""
    given = ", ".join(f"{name} {value:g}" for name, value in vars(found.assumptions).items())
    lines = [
        f"{found.model} on {found.device.name}: {found.verdict}.",
        found.findings[0],
        "",
        f"Per million output tokens, each {found.work.output_tokens} with a prompt of {found.work.prompt_tokens}:",
        *_offers(found),
        f"The cheapest of each kind and seller; -o DIR writes all {len(found.options)}.",
        "",
        *found.findings[1:],
        "",
        f"Assumed: {given}.",
        *(f"Warning: {warning}." for warning in found.warnings),
        *(f"Left out: {what}." for what in found.skipped),
    ]
    return "\n".join(lines)


def _offers(found: Comparison) -> Iterator[str]:
    """The cheapest of each kind under its name; of other models the cheapest of each who sells them."""
    from pocketmoe.profiles.compare.columns import OPTIONS, grouped
    from pocketmoe.profiles.compare.offers import cheapest_of_each, chosen

    groups = [
        (name, cheapest_of_each(rows) if rows[0].kind == "api" else rows[:_MOST_OFFERS])
        for name, rows in grouped(chosen(found.options))
    ]
    lines = iter(as_text(OPTIONS, [option for _, rows in groups for option in rows]))
    yield next(lines)
    for name, rows in groups:
        yield f"{name}:"
        yield from itertools.islice(lines, len(rows))


def _disk_rows(report: DoctorReport) -> _Rows:
    if report.disk is None:
        return [("read disk", report.disk_problem)]
    from pocketmoe.runtime.paging.readers import READERS

    busy = " (busy)" if report.load.is_busy else ""
    return [
        (
            "read disk",
            f"{in_words(read.bytes_per_s)}/s in pieces of {in_words(read.block_bytes)}, "
            f"{read.in_flight} at a time{', as experts are read' if read.in_flight == READERS else ''}{busy}",
        )
        for read in report.disk.reads
    ]


def _computing_rows(report: DoctorReport) -> _Rows:
    """Weights of experts as decoding streams them, by format; what each layer takes beside."""
    found = report.computing
    if found is None:
        return [("computing", f"not measured: {report.computing_problem}")]
    busy = " (busy)" if report.load.is_busy else ""
    rows = [
        (
            "" if number else "computing",
            f"experts in {each.scheme}: {in_words(each.far_bytes_per_s)}/s on {each.threads} "
            f"thread{'s' * (each.threads > 1)}{busy}",
        )
        for number, each in enumerate(each for each in found.products if each.what == "experts")
    ]
    layer = found.layer
    beside_s = layer.far_segment_s + layer.far_python_s
    return [*rows, ("", f"{1e6 * beside_s:.0f} us more in each layer of a large model{busy}")]


def _aligned(rows: _Rows) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
