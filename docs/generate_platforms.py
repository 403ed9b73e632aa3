"""Writes the tables of docs/PLATFORMS.md from docs/platforms.json; --check only compares them.

The JSON is what `make test-arm` and `python -m scripts.emulated x86` found.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pages import write_or_check

PAGE = Path(__file__).with_name("PLATFORMS.md")
DATA = PAGE.with_name("platforms.json")
BEGIN, END = "<!-- emulated: docs/generate_platforms.py -->\n", "<!-- /emulated -->\n"


def tables(record: dict[str, Any]) -> str:
    """Each processor with what it was refused by or what its cases came to."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"By {record['emulator']}, with {versions}; compared with {record['compared_with']}.",
        "",
        "| processor | has | cases | failed |",
        "|---|---|---|---|",
    ]
    machines = list(record["machines"].values())
    for machine in machines:
        cases = machine["cases"].values()
        failed = sum(not found["ok"] for found in cases)
        result = f"{len(cases)} | {failed}" if cases else "refused | -"
        lines.append(f"| {machine['name']} | {machine['has']} | {result} |")
    for machine in machines:
        lines += ["", f"### {machine['name']}", ""]
        if machine["refused"]:
            lines.append(f"Exit code 3 and one line: `{machine['refused']}`")
            continue
        lines += ["| case | found |", "|---|---|"]
        for name, found in machine["cases"].items():
            lines.append(f"| {name} | {'' if found['ok'] else '**failed**: '}{found['found']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    wanted = (
        before
        + BEGIN
        + "\n"
        + tables(json.loads(DATA.read_text(encoding="utf-8")))
        + "\n"
        + END
        + rest.partition(END)[2]
    )
    write_or_check(PAGE, wanted, DATA)


if __name__ == "__main__":
    main()
