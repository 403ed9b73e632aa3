"""Writes the figures of README.md and docs/MEASURED.md, and docs/speed.svg, from the rows that were measured.

The rows are benchmarks/results/qwen3-30b-a3b.jsonl, as benchmarks/against_llamacpp.py appends them. --check writes
nothing: it says whether the pages are what the rows say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "qwen3-30b-a3b.jsonl"
PICTURE = ROOT / "docs" / "speed.svg"
sys.path.insert(0, str(ROOT / "benchmarks"))

from llamacpp_table import render  # noqa: E402
from plot import Line, Plot, write_svg  # noqa: E402

SHAPE = "Qwen3-30B-A3B's shape"


def read_rows() -> list[dict]:
    """The last row of each limit, least memory first."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    return [*{row["limit_bytes"]: row for row in sorted(rows, key=lambda row: row["limit_bytes"])}.values()]


def ours(row: dict) -> float:
    """Our tokens per second."""
    return row["ours"]["figures"]["tokens_per_s"]


def theirs(row: dict) -> float:
    """llama.cpp's, in the way in which it was fastest."""
    return row["peers"][row["best_peer"]]["figures"]["tokens_per_s"]


def picture(rows: list[dict]) -> str:
    """Tokens per second against the memory of the process, ours and llama.cpp's."""
    gigabytes = [row["limit_bytes"] / 1e9 for row in rows]
    lines = [
        Line("PocketMoE", gigabytes, [row["ours"]["figures"]["tokens_per_s"] for row in rows]),
        Line(
            "llama.cpp (mmap)", gigabytes, [row["peers"][row["best_peer"]]["figures"]["tokens_per_s"] for row in rows]
        ),
    ]
    title = f"{SHAPE}, 17 GB in four bits, on {rows[0]['threads']} cores"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speed.svg"
        write_svg(path, Plot(title, "memory of the whole process, GB", "tokens per second", lines, markers=True))
        return path.read_text(encoding="utf-8")


def sentence(rows: list[dict]) -> str:
    """What README says of the picture."""

    def several(values: list[str]) -> str:
        return f"{', '.join(values[:-1])} and {values[-1]}"

    limits = several([f"{row['limit_bytes'] / 1e9:g}" for row in rows])
    speeds = several([f"{ours(row):.1f}" for row in rows])
    peers = several([f"{theirs(row):.2f}" for row in rows])
    return (
        f"{SHAPE} in {limits} GB of memory, limits that kill: {speeds} tokens/s, llama.cpp's mmap {peers}\n"
        f"({rows[0]['cpu']}, {rows[0]['threads']} cores, {rows[0]['date']}; random weights that route as it does:\n"
        "[docs/MEASURED.md](docs/MEASURED.md))."
    )


def pages(rows: list[dict]) -> dict[Path, str]:
    """Every generated file with what is to be in it."""
    readme, measured = ROOT / "README.md", ROOT / "docs" / "MEASURED.md"
    return {
        PICTURE: picture(rows),
        readme: with_block(readme, sentence(rows)),
        measured: with_block(measured, render(rows)),
    }


def with_block(page: Path, text: str) -> str:
    """A page with `text` between its marks."""
    found, count = re.subn(
        r"(<!-- speed: .*? -->\n).*?(<!-- /speed -->)",
        lambda match: f"{match[1]}{text.rstrip()}\n{match[2]}",
        page.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    if count != 1:
        raise SystemExit(f"{page} has {count} places for the figures, not one.")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    for path, text in pages(read_rows()).items():
        if args.check and (not path.is_file() or path.read_text(encoding="utf-8") != text):
            raise SystemExit(f"{path} is not what {ROWS.name} says: python docs/generate_measured.py")
        if not args.check:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
