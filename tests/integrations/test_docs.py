"""The examples of docs/OPTIMUM.md and docs/HUB.md run as they stand."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from pocketmoe.hub.client import Reference
from pocketmoe.hub.push import push
from tests.hub.server import Repository, WritableHub

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(("page", "least"), [("OPTIMUM.md", 5), ("HUB.md", 2)])
def test_the_examples(
    page: str, least: int, root: Path, hub: WritableHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In their order, in a folder with a bundle called SMALL, with a hub that has one too."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(root, tmp_path / "SMALL", ignore=shutil.ignore_patterns("packed"))
    if page == "HUB.md":
        hub.repositories["someone/olmoe-int4"] = Repository()
        hub.repositories["someone/olmoe-int4"].commit({})
        push(root, Reference("someone/olmoe-int4"))
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= least
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
