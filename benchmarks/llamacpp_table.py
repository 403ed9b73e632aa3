"""Rows of against_llamacpp.py as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def limit_tokens_per_s(row: dict) -> float:
    """What the machine would allow our engine at best, given what it missed."""
    ours = row["ours"]["figures"]
    from_ram = ours["touched_bytes_per_token"] / row["ram_bytes_per_s"]
    from_disk = ours["needed_bytes_per_token"] / row["disk_bytes_per_s"]
    return 1 / max(from_ram, from_disk)


def _peer(row: dict) -> dict:
    return row["peers"][row["best_peer"]]


def _both(row: dict, figure: str) -> float:
    return row["ours"]["figures"][figure] / _peer(row)["figures"][figure]


Column = tuple[str, Callable[[dict], str]]


def _ours(name: str, text: Callable[[dict], str]) -> Column:
    return name, lambda row: text(row["ours"]["figures"]) if row["ours"]["figures"] else ""


def _theirs(name: str, text: Callable[[dict], str]) -> Column:
    return name, lambda row: text(_peer(row)["figures"]) if row["best_peer"] else ""


def _ratio(name: str, figure: str) -> Column:
    return name, lambda row: f"{_both(row, figure):.2f}" if row["ours"]["figures"] and row["best_peer"] else ""


def _memory(row: dict) -> str:
    if row["limit_bytes"] is None:
        return "no limit"
    return f"{row['limit_bytes'] / row['gguf_bytes']:.1%} ({row['limit_bytes'] / 1e6:.0f} MB)"


def _of_limit(row: dict) -> str:
    if not row["ours"]["figures"]:
        return ""
    limit = limit_tokens_per_s(row)
    return f"{row['ours']['figures']['tokens_per_s'] / limit:.0%} of {limit:.1f}"


def _peak(row: dict) -> str:
    """Ours / llama.cpp's, in MB, as the cgroup counts, page cache included."""
    sides = [row["ours"], _peer(row) if row["best_peer"] else None]
    return " / ".join(f"{side['peak_bytes'] / 1e6:.0f}" if side and side["figures"] else "" for side in sides)


DECODE: Sequence[Column] = (
    ("memory", _memory),
    (
        "ours tokens/s",
        lambda row: f"{row['ours']['figures']['tokens_per_s']:.1f}" if row["ours"]["figures"] else "refused",
    ),
    ("llama.cpp", lambda row: f"{_peer(row)['figures']['tokens_per_s']:.2f}" if row["best_peer"] else "killed"),
    _ratio("ratio", "tokens_per_s"),
    ("of the limit", _of_limit),
    _ours("hits", lambda f: f"{f['hit_rate']:.0%}"),
    _ours("prefetched", lambda f: f"{f['prefetch_hit_rate']:.0%}"),
    _ours("MB/token", lambda f: f"{f['read_bytes_per_token'] / 1e6:.0f}"),
    _theirs("theirs", lambda f: f"{f['read_bytes_per_token'] / 1e6:.0f}"),
    _ours("computing ms", lambda f: f"{f['compute_s_per_token'] * 1e3:.1f}"),
    _ours("waiting ms", lambda f: f"{f['wait_s_per_token'] * 1e3:.1f}"),
    _ours("Python", lambda f: f"{f['python_share']:.0%}"),
    _ours("faults/token", lambda f: f"{f['major_faults_per_token']:.1f}"),
    _theirs("theirs", lambda f: f"{f['major_faults_per_token']:.0f}"),
    ("peak MB", _peak),
)

PROMPT: Sequence[Column] = (
    ("memory", _memory),
    _ours("first prompt tokens/s", lambda f: f"{f['prefill_tokens_per_s']:.0f}"),
    _theirs("llama.cpp", lambda f: f"{f['prefill_tokens_per_s']:.0f}"),
    _ratio("ratio", "prefill_tokens_per_s"),
    _ours("next prompt tokens/s", lambda f: f"{f['next_prefill_tokens_per_s']:.0f}"),
    _theirs("llama.cpp", lambda f: f"{f['next_prefill_tokens_per_s']:.0f}"),
    _ratio("ratio", "next_prefill_tokens_per_s"),
    _ours("first token s", lambda f: f"{f['ttft_s']:.2f}"),
    _theirs("theirs", lambda f: f"{f['ttft_s']:.2f}"),
    _ours("start s", lambda f: f"{f['start_s']:.2f}"),
    _theirs("theirs", lambda f: f"{f['start_s']:.2f}"),
    _ours("MB read", lambda f: f"{f['prefill_read_bytes'] / 1e6:.0f}"),
    _ours("slots", lambda f: f"{f['slots']} of {f['experts']}"),
    ("llama.cpp's way", lambda row: row["best_peer"] or ""),
    ("disk GB/s", lambda row: " ".join(f"{speed / 1e9:.1f}" for speed in row["disk_bytes_per_s_each"])),
    ("RAM GB/s", lambda row: f"{row['ram_bytes_per_s'] / 1e9:.1f}"),
)


def render(rows: Sequence[dict]) -> str:
    """Two tables, decode and prompt, and below them why an engine has no figures."""
    if not rows:
        return "(no rows)"
    lines = [*_table(DECODE, rows), "", *_table(PROMPT, rows)]
    failures = []
    for row in rows:
        outcomes = {"ours": row["ours"]} | {f"llama.cpp {how}": peer for how, peer in row["peers"].items()}
        failures += [f"- {_memory(row)}, {who}: {out['reason']}" for who, out in outcomes.items() if out["reason"]]
    return "\n".join(lines + (["", *failures] if failures else []))


def _table(columns: Sequence[Column], rows: Sequence[dict]) -> list[str]:
    lines = ["| " + " | ".join(name for name, _ in columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(text(row) for _, text in columns) + " |" for row in rows]
