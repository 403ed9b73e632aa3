"""Writes the table of docs/INSTALL.md from docs/installs.json; --check only compares them.

The JSON is what `scripts/install_matrix.py` installed and tried.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pages import write_or_check

PAGE = Path(__file__).with_name("INSTALL.md")
DATA = PAGE.with_name("installs.json")
BEGIN = "\n## What was installed and tried\n"


def table(rows: list[dict[str, Any]]) -> str:
    """A row for each installation, and the versions that came with it."""
    dates = sorted({row["date"] for row in rows})
    lines = [
        BEGIN,
        f"`python scripts/install_matrix.py demo/olmoe-int4`, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}:",
        "each in a new environment, of what this package itself asks for; the bundle is the demo's. MB are those of",
        "the environment, pip included.",
        "",
        "| installed | MB | done | came to |",
        "|---|---|---|---|",
    ]
    for row in rows:
        failed = {name: said for name, said in row["checks"].items() if said != "ok"}
        done = ", ".join(row["checks"])
        found = "; ".join(f"{name}: {' '.join(said.split())}" for name, said in failed.items()) or "all of it works"
        lines.append(f"| {row['name']} | {row.get('megabytes', '')} | {done} | {found.replace('|', '/')} |")
    lines += ["", "With these versions:", ""]
    for row in rows:
        if row.get("said"):
            lines.append(f"- {row['name']}: {'; '.join(row['said'])}")
    return "\n".join(lines) + "\n"


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    wanted = text.partition(BEGIN)[0] + table(json.loads(DATA.read_text(encoding="utf-8")))
    write_or_check(PAGE, wanted, DATA)


if __name__ == "__main__":
    main()
