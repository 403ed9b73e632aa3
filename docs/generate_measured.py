"""Writes the figures of README.md and docs/MEASURED.md, and docs/speed.svg, from the rows that were measured.

The rows are benchmarks/results/*.jsonl, as benchmarks/against_llamacpp.py appends them, a file for each table. --check
writes nothing: it says whether the pages are what the rows say.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "speed.svg"
sys.path.insert(0, str(ROOT / "benchmarks"))

from llamacpp_table import by_setting, render, render_lengths  # noqa: E402
from plot import Line, Plot, write_svg  # noqa: E402

SHAPE = "Qwen3-30B-A3B's shape"


def read_rows(name: str) -> list[dict]:
    """The rows of one file, least memory first and those without a limit at the end."""
    rows = [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return sorted(rows, key=lambda row: (row["prompt"], row["bundle"], row["limit_bytes"] or math.inf))


def ours(runs: list[dict]) -> float:
    """Our tokens per second, the median of a setting's runs."""
    return statistics.median(row["ours"]["figures"]["tokens_per_s"] for row in runs)


def theirs(runs: list[dict]) -> float:
    """llama.cpp's, in the way in which it was fastest."""
    return statistics.median(row["peers"][row["best_peer"]]["figures"]["tokens_per_s"] for row in runs)


def picture(rows: list[dict]) -> str:
    """Tokens per second against the memory of the process, ours and llama.cpp's."""
    settings = by_setting(rows)
    gigabytes = [runs[0]["limit_bytes"] / 1e9 for runs in settings]
    lines = [
        Line("PocketMoE", gigabytes, [ours(runs) for runs in settings]),
        Line("llama.cpp (mmap)", gigabytes, [theirs(runs) for runs in settings]),
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

    settings = by_setting(rows)
    limits = several([f"{runs[0]['limit_bytes'] / 1e9:g}" for runs in settings])
    speeds = several([f"{ours(runs):.1f}" for runs in settings])
    peers = several([f"{theirs(runs):.2f}" for runs in settings])
    return (
        f"{SHAPE} in {limits} GB of memory, limits that kill: {speeds} tokens/s, llama.cpp's mmap {peers}\n"
        f"({rows[0]['cpu']}, {rows[0]['threads']} cores, {rows[0]['date']}; random weights that route as it does:\n"
        "[docs/MEASURED.md](docs/MEASURED.md))."
    )


def pages() -> dict[Path, str]:
    """Every generated file with what is to be in it."""
    large = read_rows("qwen3-30b-a3b")
    blocks = {
        ROOT / "README.md": {"speed": sentence(large)},
        ROOT / "docs" / "MEASURED.md": {
            "speed": render(large),
            "olmoe": render(read_rows("olmoe-1b-7b")),
            "lengths": render_lengths(read_rows("long-texts")),
        },
    }
    return {PICTURE: picture(large)} | {page: with_blocks(page, texts) for page, texts in blocks.items()}


def with_blocks(page: Path, texts: dict[str, str]) -> str:
    """A page with each text between the marks of its name."""
    content = page.read_text(encoding="utf-8")
    for name, text in texts.items():
        parts = re.split(rf"(<!-- {name}: .*? -->\n|<!-- /{name} -->)", content)
        if len(parts) != 5:
            raise SystemExit(f"{page} has no one place for the figures of '{name}'.")
        before, begin, _, end, after = parts
        content = f"{before}{begin}{text.rstrip()}\n{end}{after}"
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    for path, text in pages().items():
        if args.check and (not path.is_file() or path.read_text(encoding="utf-8") != text):
            raise SystemExit(f"{path} is not what {RESULTS.name} says: python docs/generate_measured.py")
        if not args.check:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
