"""Rows of against_llamacpp.py as tables: a line for each setting, with the median of its runs and their spread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

Runs = Sequence[dict]  # of one setting


def limit_tokens_per_s(row: dict) -> float:
    """What the machine would allow our engine at best, given what it missed."""
    ours = row["ours"]["figures"]
    from_ram = ours["touched_bytes_per_token"] / row["ram_bytes_per_s"]
    from_disk = ours["needed_bytes_per_token"] / row["disk_bytes_per_s"]
    return 1 / max(from_ram, from_disk)


class Column(NamedTuple):
    """`text`: what a line says, given the runs of its setting."""

    name: str
    text: Callable[[Runs], str]


def _ours(row: dict) -> dict | None:
    return row["ours"]["figures"]


def _theirs(row: dict) -> dict | None:
    return row["peers"][row["best_peer"]]["figures"] if row["best_peer"] else None


def _median(
    value: Callable[[dict], float], known: Callable[[dict], object], form: str, missing: str = "", spread: bool = False
) -> Callable[[Runs], str]:
    """The median over those runs for which something is known, and with `spread` the least and the most of several."""

    def text(runs: Runs) -> str:
        values = [value(row) for row in runs if known(row)]
        if not values:
            return missing
        middle = format(statistics.median(values), form)
        return f"{middle} ({min(values):{form}}-{max(values):{form}})" if spread and len(values) > 1 else middle

    return text


def _both(row: dict) -> bool:
    return bool(_ours(row) and _theirs(row))


def _of_ours(name: str, figure: str, form: str, unit: float = 1, missing: str = "", spread: bool = False) -> Column:
    return Column(name, _median(lambda row: _ours(row)[figure] / unit, _ours, form, missing, spread))  # type: ignore[index]


def _of_theirs(name: str, figure: str, form: str, unit: float = 1, missing: str = "", spread: bool = False) -> Column:
    return Column(name, _median(lambda row: _theirs(row)[figure] / unit, _theirs, form, missing, spread))  # type: ignore[index]


def _ratio(name: str, figure: str, spread: bool = False) -> Column:
    """Ours over theirs, run by run."""
    return Column(name, _median(lambda row: _ours(row)[figure] / _theirs(row)[figure], _both, ".2f", spread=spread))  # type: ignore[index]


def _memory(runs: Runs) -> str:
    row = runs[0]
    if row["limit_bytes"] is None:
        return "no limit"
    return f"{row['limit_bytes'] / row['gguf_bytes']:.1%} ({row['limit_bytes'] / 1e6:.0f} MB)"


def _of_limit(runs: Runs) -> str:
    lived = [row for row in runs if _ours(row)]
    if not lived:
        return ""
    shares = [row["ours"]["figures"]["tokens_per_s"] / limit_tokens_per_s(row) for row in lived]
    limit = statistics.median(limit_tokens_per_s(row) for row in lived)
    return f"{statistics.median(shares):.0%} of {limit:.1f}"


def _peak(runs: Runs) -> str:
    """Ours / llama.cpp's, in MB, as the cgroup counts, page cache included."""
    sides = [[row["ours"] for row in runs], [row["peers"][row["best_peer"]] for row in runs if row["best_peer"]]]
    peaks = [[side["peak_bytes"] for side in outcomes if side["figures"]] for outcomes in sides]
    return " / ".join(f"{statistics.median(most) / 1e6:.0f}" if most else "" for most in peaks)


def _ways(runs: Runs) -> str:
    return ", ".join(dict.fromkeys(row["best_peer"] for row in runs if row["best_peer"]))


def _disk(runs: Runs) -> str:
    speeds = [speed / 1e9 for row in runs for speed in row["disk_bytes_per_s_each"]]
    return f"{min(speeds):.1f}-{max(speeds):.1f}"


DECODE: Sequence[Column] = (
    Column("memory", _memory),
    Column("runs", lambda runs: str(len(runs))),
    _of_ours("ours tokens/s", "tokens_per_s", ".1f", missing="refused", spread=True),
    _of_theirs("llama.cpp", "tokens_per_s", ".2f", missing="killed", spread=True),
    _ratio("ratio", "tokens_per_s", spread=True),
    Column("of the limit", _of_limit),
    _of_ours("hits", "hit_rate", ".0%"),
    _of_ours("prefetched", "prefetch_hit_rate", ".0%"),
    _of_ours("MB/token", "read_bytes_per_token", ".0f", 1e6),
    _of_theirs("theirs", "read_bytes_per_token", ".0f", 1e6),
    _of_ours("computing ms", "compute_s_per_token", ".1f", 1e-3),
    _of_ours("waiting ms", "wait_s_per_token", ".1f", 1e-3),
    _of_ours("Python", "python_share", ".0%"),
    _of_ours("faults/token", "major_faults_per_token", ".1f"),
    _of_theirs("theirs", "major_faults_per_token", ".0f"),
    Column("peak MB", _peak),
)

PROMPT: Sequence[Column] = (
    Column("memory", _memory),
    _of_ours("first prompt tokens/s", "prefill_tokens_per_s", ".0f"),
    _of_theirs("llama.cpp", "prefill_tokens_per_s", ".0f"),
    _ratio("ratio", "prefill_tokens_per_s"),
    _of_ours("next prompt tokens/s", "next_prefill_tokens_per_s", ".0f"),
    _of_theirs("llama.cpp", "next_prefill_tokens_per_s", ".0f"),
    _ratio("ratio", "next_prefill_tokens_per_s"),
    _of_ours("first token s", "ttft_s", ".2f"),
    _of_theirs("theirs", "ttft_s", ".2f"),
    _of_ours("start s", "start_s", ".2f"),
    _of_theirs("theirs", "start_s", ".2f"),
    _of_ours("MB read", "prefill_read_bytes", ".0f", 1e6),
    Column("slots", lambda runs: next((f"{f['slots']} of {f['experts']}" for row in runs if (f := _ours(row))), "")),
    Column("llama.cpp's way", _ways),
    Column("disk GB/s", _disk),
    Column("RAM GB/s", _median(lambda row: row["ram_bytes_per_s"] / 1e9, lambda _: True, ".1f", spread=True)),
)


LENGTHS: Sequence[Column] = (
    Column("tokens of text", lambda runs: f"{runs[0]['prompt']:,}"),
    Column("our caches", lambda runs: runs[0].get("caches", "float32")),
    Column("runs", lambda runs: str(len(runs))),
    _of_ours("ours tokens/s", "tokens_per_s", ".1f", spread=True),
    _of_theirs("llama.cpp", "tokens_per_s", ".1f", spread=True),
    _ratio("ratio", "tokens_per_s", spread=True),
    _of_ours("our prompt tokens/s", "next_prefill_tokens_per_s", ".0f"),
    _of_theirs("llama.cpp", "next_prefill_tokens_per_s", ".0f"),
    _ratio("ratio", "next_prefill_tokens_per_s", spread=True),
    Column("llama.cpp's way", _ways),
)


def by_setting(rows: Sequence[dict]) -> list[list[dict]]:
    """Rows of the same bundle, length and memory together, in the order in which each first comes."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault((row["bundle"], row["prompt"], row["limit_bytes"]), []).append(row)
    return list(found.values())


def render(rows: Sequence[dict]) -> str:
    """Two tables of rows of one kind, decode and prompt, and below them why an engine has no figures."""
    if not rows:
        return "(no rows)"
    settings = by_setting(rows)
    lines = [*_table(DECODE, settings), "", *_table(PROMPT, settings)]
    failures = []
    for row in rows:
        outcomes = {"ours": row["ours"]} | {f"llama.cpp {how}": peer for how, peer in row["peers"].items()}
        failures += [f"- {_memory([row])}, {who}: {out['reason']}" for who, out in outcomes.items() if out["reason"]]
    return "\n".join(lines + (["", *dict.fromkeys(failures)] if failures else []))


def render_lengths(rows: Sequence[dict]) -> str:
    """One table of rows of several lengths of text, everything in memory."""
    return "\n".join(_table(LENGTHS, by_setting(rows)))


def _table(columns: Sequence[Column], settings: Sequence[Runs]) -> list[str]:
    lines = ["| " + " | ".join(column.name for column in columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(column.text(runs) for column in columns) + " |" for runs in settings]
