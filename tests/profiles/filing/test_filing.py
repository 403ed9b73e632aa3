"""A filed evaluation: the record says all that it takes to repeat it, the page and the card what came out."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from pocketmoe.bundle.inspection import SOURCE_CARD, STORAGE, with_section
from pocketmoe.bundle.reader import Bundle
from pocketmoe.cli import main
from pocketmoe.quantize.apply import quantize_bundle

HOSTILE = "</pre><script>alert(1)</script>"


@pytest.fixture(scope="module")
def pair(tiny_bundle: Callable[[str], Bundle], tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    """A bundle, and what int8 makes of it."""
    before = tiny_bundle("olmoe")
    return before, quantize_bundle(before.root, tmp_path_factory.mktemp("filing") / "int8", scheme="int8")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name, words in (("plain", "the cat sat on the mat "), ("ood", "0 1 1 2 3 5 8 13 ")):
        (folder / f"{name}.txt").write_text(words * 40)
    return folder


def evaluate(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["eval", *map(str, arguments)])
    return done.exit_code, done.output


def test_the_record_is_complete(pair: tuple[Bundle, Bundle], texts: Path, tmp_path: Path) -> None:
    before, after = pair
    gate = tmp_path / "release.gate"
    gate.write_text(f"mean_kl <= 100  # {HOSTILE}\n")
    code, output = evaluate(
        after.root, "--reference", before.root, "--text", texts, "--max-tokens", 200, "--free", 2, "--gate", gate,
        "-o", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, output
    record = json.loads((tmp_path / "out/eval.json").read_text())
    assert (record["candidate"]["seal"], record["reference"]["seal"]) == (after.manifest.sha256, before.manifest.sha256)
    assert record["candidate"]["steps"] == list(after.manifest.provenance.steps)
    assert record["gate"]["sha256"] == hashlib.sha256(gate.read_bytes()).hexdigest()
    assert record["passed"]
    assert record["options"]["max_tokens"] == 200
    assert {piece["name"]: piece["text_sha256"] for piece in record["report"]["slices"]} == {
        name: hashlib.sha256((texts / f"{name}.txt").read_bytes()).hexdigest() for name in ("plain", "ood")
    }
    assert all(record["versions"][name] for name in ("pocketmoe", "onnxruntime", "numpy", "python"))
    assert record["machine"]["cores"] >= 1
    assert "the cat" not in json.dumps(record)
    page = (tmp_path / "out/eval.html").read_text()
    HTMLParser().feed(page)
    assert HOSTILE not in page
    assert record["candidate"]["seal"] in page
    assert "passed" in page
    card = (tmp_path / "out/MODEL_CARD.md").read_text()
    assert card.index(STORAGE) < card.index("## Evaluation")
    assert "**passed**" in card


def test_a_failed_gate_is_filed_too(pair: tuple[Bundle, Bundle], texts: Path, tmp_path: Path) -> None:
    before, after = pair
    gate = tmp_path / "release.gate"
    gate.write_text("mean_kl <= 0\n")
    out = tmp_path / "deep" / "out"
    given = ("--text", texts, "--max-tokens", 100, "--free", 0, "--gate", gate, "-o", out)
    code, _ = evaluate(after.root, "--reference", before.root, *given)
    assert code == 5
    assert json.loads((out / "eval.json").read_text())["passed"] is False
    assert "FAILED" in (out / "eval.html").read_text()
    assert "- FAILED: line 1" in (out / "MODEL_CARD.md").read_text()


def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    pair: tuple[Bundle, Bundle], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("pocketmoe.pipeline.evaluate.evaluate_bundle", None)
    code, output = evaluate(pair[1].root, "--text", texts, "-o", tmp_path / "file")
    assert code == 3, output
    assert "cannot be written" in output


def test_alone_without_gates(pair: tuple[Bundle, Bundle], texts: Path, tmp_path: Path) -> None:
    code, output = evaluate(pair[0].root, "--text", texts, "--max-tokens", 100, "-o", tmp_path / "out")
    assert code == 0, output
    record = json.loads((tmp_path / "out/eval.json").read_text())
    assert (record["reference"], record["gate"], record["verdicts"]) == (None, None, [])


def test_a_quantized_bundles_card_says_so(pair: tuple[Bundle, Bundle], tmp_path: Path) -> None:
    before, after = pair
    cards = [(bundle.root / "MODEL_CARD.md").read_text() for bundle in pair]
    assert all(card.count(STORAGE) == 1 for card in cards)
    assert "| experts | fp32 |" in cards[0]
    assert f"| experts | {after.manifest.expert_kinds[0].scheme} |" in cards[1]
    assert f"- {after.manifest.provenance.steps[-1]}" in cards[1]
    copy = Path(shutil.copytree(before.root, tmp_path / "copy"))
    assert Bundle.open(copy).manifest.files["MODEL_CARD.md"].nbytes == len(cards[0].encode())


@given(
    ours=st.lists(st.sampled_from(["# Title", "text", STORAGE, "## Evaluation", "| a | b |", ""]), max_size=8),
    theirs=st.lists(st.sampled_from(["# Theirs", STORAGE, "## Evaluation", "secret", SOURCE_CARD]), max_size=6),
    source=st.booleans(),
)
def test_a_section_is_there_once_and_the_sources_card_stays(ours: list[str], theirs: list[str], source: bool) -> None:
    tail = "\n".join([SOURCE_CARD, "", *theirs]) if source else ""
    card = with_section("\n".join([*ours, tail]), STORAGE, ["- first"])
    again = with_section(card, STORAGE, ["- second"])
    assert "- first" not in again
    if not source:
        return
    mine, _, rest = again.partition(SOURCE_CARD)
    assert "- second" in mine
    assert rest.strip() == "\n".join(theirs).strip()
