"""What a profile comes to: the speed, the knee, what memory that is saved costs; and how far it can be trusted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pocketmoe.profiles.profile import Profile, Run
from pocketmoe.profiles.report.html import Markup, el
from pocketmoe.sizes import in_words

BUSY = 0.05  # of the processors' time that others take: above it a figure is not what the machine can do
_KNEE = 0.9  # of the fastest: who gives up that little gives up no more than noise and a little


def untouched(profile: Profile) -> list[Run]:
    """The runs whose reads were not slowed down on purpose, least memory first; all where there are no others."""
    return [run for run in profile.runs if run.read_bytes_per_s is None] or [*profile.runs]


def fastest(runs: Sequence[Run]) -> Run:
    return max(runs, key=lambda run: run.decode_tokens_per_s)


def knee(runs: Sequence[Run]) -> Run:
    """The least memory that makes nine tenths of the fastest speed: below it, saving begins to cost."""
    enough = _KNEE * fastest(runs).decode_tokens_per_s
    return min((run for run in runs if run.decode_tokens_per_s >= enough), key=lambda run: run.memory_budget_bytes)


def loaded(run: Run) -> bool:
    """Whether others were busy meanwhile, on the processors or the disk."""
    return run.loaded or run.others_cpu > BUSY  # a record of before has only the latter


def headline(runs: Sequence[Run]) -> str:
    """What the memory that is saved costs, in a sentence or two."""
    most, at, least = fastest(runs), knee(runs), runs[0]
    words = f"{_speed(most)} tokens/s in {in_words(most.memory_budget_bytes)}"
    if at is not most:
        memory, speed = _against(at, most)
        words += (
            f"; the knee is at {in_words(at.memory_budget_bytes)}: {memory:.0%} less memory, {speed:.0%} of the speed"
        )
    if len(runs) == 1:
        return f"{words}."
    if least is at or least is most:
        return f"{words}: the least budget that was measured is enough."
    memory, speed = _against(least, most)
    return (
        f"{words}. The least measured, {in_words(least.memory_budget_bytes)}, takes {memory:.0%} less memory and makes "
        f"{_speed(least)} tokens/s, {speed:.0%} of the speed."
    )


def _against(run: Run, most: Run) -> tuple[float, float]:
    """The share of memory that is saved, and of speed that is left."""
    saved = 1 - run.memory_budget_bytes / most.memory_budget_bytes
    return saved, run.decode_tokens_per_s / most.decode_tokens_per_s


def _speed(run: Run) -> str:
    return f"{run.decode_tokens_per_s:.3g}"


def head(profile: Profile) -> Iterator[Markup]:
    """Title, headline, tiles and warnings."""
    model, work, machine, runs = profile.model, profile.workload, profile.machine, untouched(profile)
    yield el("h1", f"{model.name} on {machine.cpu}: {_speed(fastest(runs))} tokens/s")
    yield el("p", headline(runs), class_="lead")
    yield from warnings(profile)
    yield el("ul", *tiles(runs), class_="tiles")
    source = f"the text {work.text}" if work.source == "text" else f"random tokens (seed {work.seed})"
    stored = model.schemes.get("experts", "?")
    yield el(
        "p",
        f"{model.architecture}, {model.parameters / 1e6:,.0f} million parameters, experts in "
        f"{stored if len(stored) < 50 else 'several formats'}. {machine.cpu}, {machine.cores} cores, "
        f"{in_words(machine.memory_bytes)} of memory. Workload: a prompt of {work.prompt_tokens} tokens from "
        f"{source} and {work.output_tokens} sampled tokens. Measured {runs[-1].measured_at}.",
        class_="soft",
    )


def tiles(runs: Sequence[Run]) -> Iterator[Markup]:
    """The figures to remember, each once; those of a loaded machine in grey. What is not known has no tile."""
    shown = {id(run): run for run in (fastest(runs), knee(runs), runs[0])}
    for run in shown.values():
        words = [f"tokens/s in {in_words(run.memory_budget_bytes)}"]
        words += ["the knee"] if run is knee(runs) and len(runs) > 1 else []
        words += ["the least measured"] if run is runs[0] and len(runs) > 1 else []
        yield _tile(_speed(run), ", ".join(words), run)
    times = sorted(run.ttft_s for run in runs)
    spread = f"{times[0]:.2g}" if len(runs) == 1 else f"{times[0]:.2g} to {times[-1]:.2g}"
    yield _tile(f"{spread} s", "to the first token, from cold", *runs)
    energy = fastest(runs).energy
    if energy.joules_per_token is not None:
        yield _tile(f"{energy.joules_per_token:.2f} J", f"per token ({energy.label})", fastest(runs))


def _tile(value: str, what: str, *runs: Run) -> Markup:
    busy = any(map(loaded, runs))
    return el("li", el("b", value), what + (", on a loaded machine" if busy else ""), class_="loaded" if busy else None)


def first_token_words(profile: Profile) -> str:
    """Why the first token takes what it takes, and why more memory can make it later."""
    runs = untouched(profile)
    read = sorted(run.prompt_reads for run in runs)
    number = str(read[0]) if read[0] == read[-1] else f"{read[0]} to {read[-1]}"
    each = in_words(profile.model.expert_read_bytes)
    return (
        f"First token: every run begins cold, in a new process, so the prompt first reads {number} experts from disk "
        f"({each} each). More memory keeps more of them, and making the slot of an expert that is kept takes its time "
        "too, so that a larger budget can be later here. The next prompt of the same process finds them in memory."
    )


def warnings(profile: Profile) -> Iterator[Markup]:
    """What disturbed the measurement."""
    said: list[str] = []
    busy = [run for run in profile.runs if loaded(run)]
    if busy:
        names = ", ".join(f"{run.memory} ({run.others_cpu:.0%})" for run in busy)
        said.append(
            f"Others were at work meanwhile (their share of the processors): {names}. Figures in grey are worse than "
            "this machine's own, and neither the knee nor a prediction can be relied on. Measure again when it is idle."
        )
    unlimited = [run for run in profile.runs if run.limited_by == "process"]
    if unlimited:
        why = unlimited[0].limit_problem
        said.append(f"No real memory limit could be set ({why}): the process kept to its budget by itself.")
    if said:
        yield el("ul", *(el("li", words) for words in said), class_="warn")
