"""What the generators of pages share: a page is written, or with --check only compared with what it should be."""

from __future__ import annotations

import sys
from pathlib import Path


def write_or_check(page: Path, wanted: str, data: Path) -> None:
    """`wanted`: the whole page, made of `data` by the script that runs. Exits with a line where a check fails."""
    if "--check" not in sys.argv[1:]:
        page.write_text(wanted, encoding="utf-8")
    elif page.read_text(encoding="utf-8") != wanted:
        sys.exit(f"{page.name} is not what {data.name} says: python docs/{Path(sys.argv[0]).name}")
