"""Writes the table of docs/QUANTIZED_CHECKPOINTS.md from docs/quantized_origins.json; --check only compares them.

The JSON is what `benchmarks/quantized_origins.py` measured against the formats' own libraries.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from pages import write_or_check

PAGE = Path(__file__).with_name("QUANTIZED_CHECKPOINTS.md")
DATA = PAGE.with_name("quantized_origins.json")
BEGIN = "\n## Against the formats' own libraries\n"


def table(rows: list[dict[str, Any]]) -> str:
    """A row for each weight [64, 256] that a library packed."""
    lines = [
        BEGIN,
        "`python benchmarks/quantized_origins.py --json docs/quantized_origins.json`, with the libraries: a weight of",
        "64 rows of 256, packed by the library and read by us. *Dequantized*: equal, bit for bit, to what it makes of",
        "it, or the relative error. *Codes kept*: how far the same codes are without its rounding.",
    ]
    for (library, version), group in groupby(rows, lambda row: (row["library"], row["version"])):
        lines += ["", f"| {library} {version} | dequantized | codes kept |", "|---|---|---|"]
        for row in group:
            found = "equal" if row["equal"] else f"{row['error']:.1e}"
            lines.append(f"| {row['format']} | {found} | {row['unrounded']:.1e} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    wanted = text.partition(BEGIN)[0] + table(json.loads(DATA.read_text(encoding="utf-8")))
    write_or_check(PAGE, wanted, DATA)


if __name__ == "__main__":
    main()
