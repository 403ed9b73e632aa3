"""Releases and workflows: what may not be published is refused, and machines call the targets that people call."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]
WORKFLOWS = sorted((REPOSITORY / ".github/workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):.*##", (REPOSITORY / "Makefile").read_text("utf-8"), re.MULTILINE))


def git(root: Path, *words: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", *who, *words], cwd=root, check=True, capture_output=True)


def release(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    script = root / "scripts/release.py"
    return subprocess.run([sys.executable, script, *options], capture_output=True, text=True, check=False)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A package as small as can be, its version tagged."""
    for name in ("pyproject.toml", "README.md", "LICENSE", "scripts/release.py", ".gitignore"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(REPOSITORY / name, tmp_path / name)
    (tmp_path / "pocketmoe").mkdir()
    (tmp_path / "pocketmoe/__init__.py").write_text('__version__ = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.3 (2026-11-30)\n\n- All of it.\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "All")
    git(tmp_path, "tag", "-a", "v1.2.3", "-m", "1.2.3")
    return tmp_path


def test_a_tag_becomes_the_same_files_each_time(project: Path) -> None:
    """An sdist, a wheel, and checksums that hold."""
    first = release(project)
    assert first.returncode == 0, first.stderr
    names = ["SHA256SUMS", "pocketmoe-1.2.3-py3-none-any.whl", "pocketmoe-1.2.3.tar.gz"]
    assert sorted(path.name for path in (project / "dist").iterdir()) == names
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=project / "dist", check=True)
    sums = (project / "dist/SHA256SUMS").read_bytes()
    assert release(project).returncode == 0
    assert (project / "dist/SHA256SUMS").read_bytes() == sums


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("dirty", "changes that are not committed"),
        ("unreleased", "CHANGELOG.md has no heading '## 1.2.3"),
        ("untagged", "no tag v1.2.3"),
    ],
)
def test_what_nobody_could_name_is_not_released(project: Path, fault: str, words: str) -> None:
    """A dirty tree, a version that the changelog does not date, a commit after the tag; nothing is built."""
    if fault == "dirty":
        (project / "new.py").touch()
    elif fault == "unreleased":
        (project / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.3 (unreleased)\n")
        git(project, "commit", "--all", "--quiet", "-m", "Not yet")
    else:
        git(project, "commit", "--allow-empty", "--quiet", "-m", "Later")
    for options in ((), ("--check",)):
        done = release(project, *options)
        assert done.returncode == 1
        assert words in done.stderr
    assert not (project / "dist").exists()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_the_targets_of_the_makefile(path: Path) -> None:
    """It is YAML, may do no more than it must, and has no way of its own to build, lint or test."""
    found: dict[Any, Any] = yaml.safe_load(path.read_text("utf-8"))
    assert found["permissions"] == {"contents": "read"}
    assert found[True], "on, which YAML 1.1 reads as true"
    for job in found["jobs"].values():
        assert job["timeout-minutes"]
        commands = [step["run"] for step in job["steps"] if "run" in step]
        made = [command.split()[1] for command in commands if command.startswith("make ")]
        assert {*made} <= TARGETS
        assert {"lint", "test"} <= {*made}
        assert all(command.startswith(("make ", "gh release create ")) for command in commands)


def test_every_target_says_what_it_does() -> None:
    """`make help` lists each target, and a name that is no file is phony."""
    makefile = (REPOSITORY / "Makefile").read_text("utf-8")
    phony = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    assert phony is not None
    assert {*phony[1].split()} == TARGETS
