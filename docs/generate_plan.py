"""Writes docs/PLAN.md: how `plan` and `profile --predict` predict, and what such predictions were off by.

It measures nothing: speeds are in tests/profiles/estimate/data/speeds.toml, constants in
pocketmoe/profiles/estimate/speed.toml. --check says whether the page is what they say.
"""

from __future__ import annotations

import statistics
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).with_name("PLAN.md")
sys.path.insert(0, str(PAGE.parents[1]))

from pocketmoe.profiles.catalogue.devices import known_devices  # noqa: E402
from pocketmoe.profiles.estimate.classes import speed_classes  # noqa: E402
from pocketmoe.sizes import range_words  # noqa: E402
from tests.profiles.estimate.speeds import Recorded, Row, measured, published, recorded  # noqa: E402

_WITHIN, _WIDTH = 0.15, 120
TEXT = """# What `plan` predicts, and how wrong it is

This page is written by `python docs/generate_plan.py`.

`plan` and `profile --predict` share one model of a decode step (`pocketmoe/profiles/estimate/step.py`):

    token = bytes of attention, norms, head / what their format streams at
          + bytes of the chosen experts     / what their format streams at
          + what each layer takes whatever its size
          + what must be read from disk, less what is computed meanwhile

Weights are fetched from memory and then computed with, and the two add up. `profile --predict` takes the seconds of
computing from two measured budgets, and, for another device, by how much the model was slower or faster here than this
class of processor would have it. `plan --device this` measures computing (`pocketmoe/profiles/machine/computing.py`,
5 s; `doctor` shows it, profiles keep it): the runtime's own kernels, slots and helpers on made-up experts and dense
weights of each format, from the caches and from memory, with one thread and with as many as it would use; attention;
and a small bundle through the whole runtime, which says what a layer takes whatever its size, with caches that hold it
and with caches that a large model has displaced, and what experts take more that were not in memory. Other devices have
their class alone:

{constants}

Each figure says where it comes from in `pocketmoe/profiles/estimate/speed.toml`. `benchmarks/calibrate_plan.py` prints
them anew from profiles of a quiet machine. A device's memory streams at 67% of its bus, or at what its cores can take.

What is printed is a range: 15% either way where computing was measured (`--device this`), and more on a machine whose
speed changes while it is measured; 30% where figures were looked up, 40% where nothing was tested; the disk 40% either
way; and hit rates between traces. Verdicts go by the middle.

A token's active parameters are those that it is multiplied with: of the embedding it reads a row, so that this does not
count, and the head does. So counts OpenAI (3.6 and 5.1 billion of gpt-oss); of eight published figures this rule is 3%
off in the mean, 9% at most (Qwen3-30B-A3B 3.04 where 3.3 is published, OLMoE 1.18 for 1.3, DeepSeek-V3 36.6 for 37).
Counting the embedding would be 5% and 16% off, leaving out the head as well 10% and 17%.

## What is advised

Candidates are all schemes at several budgets, and each again with `--kv int8` where its caches take more than a
twentieth of the least budget. Three are named: the fastest; the best quality that reaches the target (the first of
fp32, int8, int4, nf4, mixed, int4-all that does), in the memory beyond which it gains no 5%; and the least memory that
reaches it. The best quality is taken. Without a target 8 tokens/s are aimed at, else 3, else the fastest is taken.
Float32 is never advised. Quality is what the reference model lost, whatever the model. The download goes by the type
that config.json names, the time of an export by two that were measured (docs/LOG.md); both are estimates.

## This runtime, measured

On shared virtual machines, whose memory changes from day to day: each row is predicted with that day's. The constants
come from the first of these machines' parts (an expert alone, small operators, the hand-over), not from these rows, but
whoever chose them knew the rows: treat them as a fit. `Disk changed`: its speed was not what it was before and after.

{ours}

## Two machines, at every budget

Recorded by `benchmarks/calibrate_plan.py --record`: threads (1 q: a CPU quota of one core), disks slowed on purpose.
*Plan* is what `plan --device this` would say by what was measured of the machine before the profile, *fitted* what two
of the profile's own budgets say of the others (`profile`; those two are left out). Beside a run marked *busy* others
were at work: its errors mean little. Routing is the recorded one in both.

### Intel Sapphire Rapids, virtual machine of 2 cores, 2026-12-01: computing was measured

{summary}

No constant was fitted to these rows. What was changed after seeing rows of earlier recordings of the day is in
docs/LOG.md ('Computing is measured, not looked up'): the form of the model, not figures. What is left:

- This machine's speed changes: the same work takes 1.3 to 2.1 times as long at slow moments as at fast ones, for a
  tenth of a second or for a minute. A small piece of work is timed beside each token (`pace_s`), and what does not wait
  for memory is predicted for the pace that it shows. A buyer has no such figure: without it, the errors are
  {without_pace}.
- What waits for memory changes too, and nothing tells: with all experts in memory the 16 layers' came at 11.7 GB/s on
  two threads, where 19 were measured some minutes before, and on one thread at half of what was measured.
- The reference model, whose experts are of 28 kB, is predicted 10 to 40% too fast with most of them in memory: each
  takes 24 to 40 us, the small bundle's, of 6 kB, 15 to 25, and the difference is not the bytes'.
- Under a quota at 25% the disk was slower while it was measured than afterwards.

{measured_here}

### AMD EPYC, virtual machine of 2 cores, 2026-11-30: by its class

Computing was not measured then, and by the class alone *plan* is far off. It is too fast where all experts are in
memory, by 15% on one thread and by 35 to 75% on two: the two processors behave like threads of one core, which the
machine does not say: two compute 1.2 times as fast as one, while memory streams 1.9 times as fast. It is too slow, by
15 to 35%, where the disk decides: the file that `doctor` read came at 1.1 GB/s, experts while decoding at 1.5 to 1.9.
On the machine above a temporary file, bundles of 0.9 and 3.4 GB, other buffers and other sizes of reads all came at 0.9
to 1.5 GB/s within five minutes: it is the minute that decides. Large reads are taken twice now, and `doctor` says by
how much they differ. What `profile` says of other budgets and disks holds there: half of the rows are within 5%. Those
that are not: the reference model at 75% (whose least budget was measured beside other work), and one run whose disk was
slower than in the median of the runs.

{by_class}

## llama.cpp on the CPU, published

Another engine, so not what is predicted, but on devices that nobody measured for us. On the machine where both were, we
made 0.86 to 1.00 of its speed with everything in memory, on another 1.5.

{theirs}

## Devices

{devices}

They are in `pocketmoe/profiles/catalogue/devices.toml`, and `plan --devices FILE` reads more of that form: figures in
bytes, bytes per second, operations per second, watts and US dollars, each with `value`, `source`, `as_of` (a date) and
`confidence` (V, read in the source; M, from memory; C, computed); `instructions` is `avx2`, `avx512_vnni`, `amx` or
`neon_dotprod`.
"""


def main() -> int:
    """Write the page, or check it."""
    page = TEXT.format(
        constants=_constants(),
        ours=_table(measured()),
        **_recorded(),
        theirs=_table(published()),
        devices=_devices(),
    )
    if "--check" in sys.argv:
        if PAGE.exists() and PAGE.read_text() == page:
            return 0
        print(f"{PAGE.name} is not what the data says: run python docs/{Path(__file__).name}")
        return 1
    PAGE.write_text(page)
    return 0


def _constants() -> str:
    lines = [
        "| class | of memory's bandwidth | int4, of the int8 peak | int8 | nf4, fp4 | a layer | hand-over "
        "| after waits | tested |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for name, known in speed_classes().items():
        figures = (known.memory_share, known.int4_share, known.int8_share, known.float4_share)
        shares = [f"{100 * figure.value:.2g}%" if figure.value < 0.1 else f"{figure.value:.0%}" for figure in figures]
        times = [f"{1e6 * figure.value:.0f} us" for figure in (known.layer_s, known.hand_over_s)]
        cells = [name, *shares, *times, f"x {known.after_waits.value:g}", "yes" if known.tested else "no"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _table(rows: Sequence[Row]) -> str:
    lines = ["| what | on | tokens/s | predicted | range | off | source |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        mark = ", disk changed" if row.disk_changed else ""
        cells = [row.what, row.where, f"{row.known:g}", f"{row.predicted:.3g}", range_words(row.low, row.high)]
        lines.append(f"| {' | '.join(cells)} | {row.error:+.0%}{mark} | {row.source} |")
    return "\n".join(lines)


def _recorded() -> dict[str, str]:
    """Tables of profiles with computing measured and without, and what is said of the former."""
    entries = recorded()
    here = [entry for entry in entries if entry.profile.machine.computing]
    quiet = [entry for entry in here if not entry.run.loaded]
    off = sorted(quiet, key=lambda entry: abs(entry.planned.error))
    within = sum(abs(entry.planned.error) <= _WITHIN for entry in quiet)
    worst = ", ".join(
        f"{entry.planned.what} at {entry.run.memory} {entry.planned.error:+.0%}"
        for entry in off[::-1]
        if abs(entry.planned.error) > _WITHIN
    )
    plain = [abs(entry.plain_error) for entry in quiet]
    return {
        "summary": "\n".join(
            textwrap.wrap(
                f"{within} of {len(quiet)} rows of a quiet machine are within 15%, {_median(quiet):.0%} off in the "
                f"median. Not within: {worst}.",
                _WIDTH,
            )
        ),
        "without_pace": f"{statistics.median(plain):.0%} in the median, {max(plain):.0%} at most",
        "measured_here": _runs(here),
        "by_class": _runs([entry for entry in entries if not entry.profile.machine.computing]),
    }


def _median(entries: Sequence[Recorded]) -> float:
    return statistics.median(abs(entry.planned.error) for entry in entries)


def _runs(entries: Sequence[Recorded]) -> str:
    lines = ["| profile | threads | budget | disk | tokens/s | plan | range | off | fitted | off |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for entry in entries:
        run, row, quota = entry.run, entry.planned, entry.profile.machine.quota_cores
        threads = f"{entry.profile.settings.threads}" + (f", {quota:g} q" if quota else "")
        disk = f"{run.read_bytes_per_s / 1e6:.0f} MB/s" if run.read_bytes_per_s else "as it is"
        fitted = ["", ""] if entry.calibrated else [f"{entry.fitted_tokens_per_s:.3g}", f"{entry.fitted_error:+.0%}"]
        busy = " (busy)" if run.loaded else ""
        cells = [row.what, threads, run.memory, disk, f"{row.known:.3g}{busy}", f"{row.predicted:.3g}"]
        cells += [range_words(row.low, row.high), f"{row.error:+.0%}", *fitted]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _devices() -> str:
    lines = ["| name | what | instructions | memory GB/s | disk | note |", "|---|---|---|---|---|---|"]
    for name, device in known_devices().items():
        bus = device.memory_bandwidth_bytes_per_s.value / 1e9
        lines.append(
            f"| `{name}` | {device.title} | {device.instructions} | {bus:.0f} | {device.disk_name} | {device.note} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
