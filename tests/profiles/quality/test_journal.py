"""Evaluations that are killed: the journal, what it refuses, and the report after going on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pocketmoe.bundle.reader import Bundle
from pocketmoe.cli import main
from pocketmoe.errors import BadInput, DamagedFile
from pocketmoe.profiles.quality.journal import Journal
from pocketmoe.profiles.quality.quality import Slice, evaluate
from pocketmoe.profiles.quality.report import QualityReport, Seen

KEY = {"bundles": ["ab"], "window": 64}
WORDS = "The quick brown fox jumps over the lazy dog; Zürich, naïve, 12345 mixtures of experts. "
TEXTS = [Slice("docs", WORDS * 6), Slice("ood", WORDS[::-1] * 6, out_of_distribution=True)]
floats = arrays(np.float64, st.integers(0, 5), elements=st.floats(allow_nan=False))


def written(path: Path, parts: list[tuple[np.ndarray, ...]]) -> list[tuple[np.ndarray, ...]]:
    """What comes back of parts after the file has been closed and opened."""
    path.unlink(missing_ok=True)
    with Journal(path, KEY) as journal:
        for part in parts:
            journal.append(part)
    return kept(path)


def kept(path: Path) -> list[tuple[np.ndarray, ...]]:
    with Journal(path, KEY) as journal:
        return journal.parts


def same(found: list[tuple[np.ndarray, ...]], expected: list[tuple[np.ndarray, ...]]) -> bool:
    def raw(parts: list[tuple[np.ndarray, ...]]) -> list[list[bytes]]:
        return [[array.tobytes() for array in part] for part in parts]

    return raw(found) == raw(expected)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None)
@given(st.lists(st.tuples(floats, floats), max_size=4), st.data())
def test_torn_anywhere(tmp_path: Path, parts: list[tuple[np.ndarray, ...]], data: st.DataObject) -> None:
    """What was whole before a kill comes back bit for bit, and the journal goes on from there."""
    path = tmp_path / "journal"
    assert same(written(path, parts), parts)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    lines = whole[:cut].count(b"\n")
    left = parts[: max(0, lines - 1)]
    with Journal(path, KEY) as journal:
        assert same(journal.parts, left)
        for part in parts[len(left) :]:
            journal.append(part)
    assert path.read_bytes() == whole


def test_what_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    part = (np.array([1.0]),)
    written(path, [part, part])
    whole = path.read_bytes()
    with pytest.raises(BadInput, match=r"another evaluation \(window differs\)"):
        Journal(path, {**KEY, "window": 32})
    with Journal(path, KEY), pytest.raises(BadInput, match="in use"):
        Journal(path, KEY)
    path.write_bytes(whole.replace(b"A", b"B", 1))
    with pytest.raises(DamagedFile, match="line 2"):
        Journal(path, KEY)
    for other in (b"my thesis", b"my\nthesis\n"):
        path.write_bytes(other)
        with pytest.raises(DamagedFile, match="line 1"):
            Journal(path, KEY)
        assert path.read_bytes() == other


class Killed(Exception):
    """In place of a signal."""


class Evaluation:
    """One of seven parts, the last three of them answers, which can be killed before a part."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.started: list[int] = []
        self.killed_at = -1

    def run(self, journal: Path | None = None, *, killed_at: int = -1, window: int = 64) -> QualityReport:
        """The report without its speeds, which no two runs share."""
        self.started, self.killed_at = [], killed_at
        report = evaluate(
            self.bundle,
            TEXTS,
            reference=self.bundle,
            window=window,
            max_tokens=129,
            free_prompts=3,
            journal=journal,
            progress=self.note,
        )
        return replace(report, seen=Seen(0, None, None))

    def note(self, what: str, done: int, _total: int) -> None:
        if what == "evaluating":
            self.started.append(done)
            if done == self.killed_at:
                raise Killed


def test_the_same_report_after_kills(tiny_bundle: Callable[[str], Bundle], tmp_path: Path) -> None:
    """Bit for bit, killed among the windows and among the answers; and nothing is computed twice."""
    evaluation, path = Evaluation(tiny_bundle("olmoe")), tmp_path / "journal"
    for killed_at in (2, 5):
        with pytest.raises(Killed):
            evaluation.run(path, killed_at=killed_at)
    went_on = evaluation.run(path)
    assert evaluation.started == [5, 6, 7]
    assert went_on == evaluation.run()
    assert went_on == evaluation.run(path)
    assert evaluation.started == [7]
    with pytest.raises(BadInput, match="window differs"):
        evaluation.run(path, window=32)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    directory = tmp_path / "texts"
    directory.mkdir()
    for piece in TEXTS:
        (directory / f"{piece.name}.txt").write_text(piece.text)
    return directory


def test_the_command(tiny_bundle: Callable[[str], Bundle], texts: Path, tmp_path: Path) -> None:
    """A gate that holds exits 0, one that does not 5 with its rows, a malformed one 3; stdout is one JSON object."""
    bundle = str(tiny_bundle("olmoe").root)
    gate = tmp_path / "gate"
    options = ["eval", bundle, "--text", str(texts), "--max-tokens", "65", "--gate", str(gate), "--json"]
    compared = [*options, "--reference", bundle, "--free", "2", "--resume", str(tmp_path / "journal")]

    def run(command: list[str], limits: str) -> tuple[int, str, str]:
        gate.write_text(limits)
        done = CliRunner().invoke(main, command)
        return done.exit_code, done.stdout, done.stderr

    code, out, err = run(compared, "mean_kl <= 0.001\nood: free_same >= 1\nout_of_distribution: router >= 1\n")
    assert code == 0, err
    report = json.loads(out)
    assert [verdict["passed"] for verdict in report["verdicts"]] == [True] * 7
    assert [piece["out_of_distribution"] for piece in report["slices"]] == [False, True]
    assert report["candidate_accuracy_levels"] == []

    code, out, err = run(compared, "top1 >= 1\nworst: perplexity <= 2\n")
    assert code == 5
    told = json.loads(err.splitlines()[-1])["error"]
    assert told.startswith("1 of 6 gates failed: line 2: worst: perplexity <= 2: ")
    assert "limit 2" in told
    assert [verdict["passed"] for verdict in json.loads(out)["verdicts"]] == [True, False, *[True] * 4]

    for limits, message in (("kl <= 2", "line 1: there is no metric 'kl'"), ("mean_kl < 2", "Give --reference")):
        code, out, err = run(options, limits)
        assert (code, out) == (3, "")
        assert message in err
    gate.write_text("perplexity <= 1e9")
    for wrong, message in ((["--ood", "prose"], "no slice 'prose'"), (["--resume", str(gate)], "line 1 is not one")):
        done = CliRunner().invoke(main, [*options, *wrong])
        assert done.exit_code == 3
        assert message in done.stderr
