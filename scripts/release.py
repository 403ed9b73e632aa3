"""From a tag to what is published: an sdist, a wheel and their checksums, in dist/.

    python scripts/release.py [--check]        --check builds nothing

The version stands in pocketmoe/__init__.py alone. Refused are a tree with changes, a version that CHANGELOG.md does not
name with a date, and a commit that the version's tag is not on. The same commit gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"


def git(*words: str) -> str:
    """What git says of the repository."""
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def version() -> str:
    """The version in the package."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "pocketmoe/__init__.py").read_text("utf-8"), re.MULTILINE)
    return found[1] if found else sys.exit("pocketmoe/__init__.py names no version")


def refusal(name: str) -> str:
    """Why this tree is not to be published as that version; nothing where it is."""
    changed = git("status", "--porcelain")
    if changed:
        return f"the tree has changes that are not committed:\n{changed}"
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    if not re.search(rf"^## {re.escape(name)} \(\d{{4}}-\d{{2}}-\d{{2}}\)$", changelog, re.MULTILINE):
        return f"CHANGELOG.md has no heading '## {name} (YYYY-MM-DD)'"
    if f"v{name}" not in git("tag", "--points-at", "HEAD").split():
        return f"this commit has no tag v{name}: git tag -a v{name}"
    return ""


def build() -> list[Path]:
    """The sdist and the wheel of the commit, dated by it."""
    shutil.rmtree(DIST, ignore_errors=True)
    dated = os.environ | {"SOURCE_DATE_EPOCH": git("log", "-1", "--format=%ct")}
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", DIST], cwd=ROOT, env=dated, check=True)
    return sorted(DIST.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether this could be published")
    args = parser.parse_args()
    name = version()
    why = refusal(name)
    if why:
        sys.exit(f"Not released: {why}")
    if not args.check:
        sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in build()]
        (DIST / "SHA256SUMS").write_text("\n".join(sums) + "\n", encoding="utf-8")
        print("\n".join(sums))


if __name__ == "__main__":
    main()
