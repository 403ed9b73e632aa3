"""`quantize` as a Python user calls it: what the command offers, without the command."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from pocketmoe.bundle.reader import Bundle
from pocketmoe.pipeline import quantize as pipeline
from pocketmoe.pipeline.quantize import QuantizeRequest, quantize
from pocketmoe.quantize.algorithms.formats import parse_format
from pocketmoe.quantize.apply import quantize_bundle
from pocketmoe.quantize.plan import SizeBudget
from tests import bundles
from tests.quantize.graphs.test_caches import letters

TinyBundle = Callable[[str], Bundle]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(letters(0), encoding="utf-8")
    return path


def test_a_scheme_by_name_is_what_quantize_bundle_makes(tiny_bundle: TinyBundle, tmp_path: Path) -> None:
    """Without a text nothing is measured: the bytes are those of the step below."""
    source = tiny_bundle("olmoe").root
    found = quantize(source, tmp_path / "a", QuantizeRequest(scheme="int8"))
    assert found.plan is None
    quantize_bundle(source, tmp_path / "b", scheme="int8")
    assert bundles.tree(tmp_path / "a") == bundles.tree(tmp_path / "b")


def test_mixed_precision_comes_with_its_plan_and_goes_on_after_a_failure(
    tiny_bundle: TinyBundle, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibrate, choose, quantize in one call; nothing but the bundle is left, also where a step fails."""
    request = QuantizeRequest(
        scheme="mixed",
        size_budget=SizeBudget.parse("20%"),
        rounding="nearest",
        calibration=text,
        calibration_tokens=512,
    )
    said: list[str] = []
    output = tmp_path / "mixed"

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("a disk that fails")

    monkeypatch.setattr(pipeline, "quantize_bundle", fail)
    with pytest.raises(OSError, match="a disk that fails"):
        quantize(tiny_bundle("olmoe").root, output, request)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    monkeypatch.undo()
    found = quantize(tiny_bundle("olmoe").root, output, request, lambda what, *_: said.append(what))
    assert found.bundle.root == output
    assert found.plan is not None
    total = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    assert total <= 0.2 * sum(p.stat().st_size for p in tiny_bundle("olmoe").root.rglob("*") if p.is_file())
    assert said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixed", "text.txt"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scheme": "mixed"}, "need --calibration"),
        ({"kv": "int8"}, "need --calibration"),
        ({"rounding": "gptq"}, "need --calibration"),
        ({"scheme": "keep", "formats": {"experts": parse_format("int4-b32-asym")}}, "does not go with --scheme keep"),
        ({"scheme": "mixed", "calibration": Path("text")}, "needs --size-budget or --fetch-budget"),
        ({"size_budget": SizeBudget(total_bytes=1)}, "for it alone"),
    ],
)
def test_what_does_not_go_together_is_refused_when_it_is_asked(options: Mapping[str, Any], words: str) -> None:
    """A request that nothing can meet is no request, whoever makes it; the command calls it usage."""
    with pytest.raises(ValueError, match=words):
        QuantizeRequest(**options)


def test_the_algorithm_follows_the_text() -> None:
    assert QuantizeRequest().algorithm == "search"
    assert QuantizeRequest(calibration=Path("text")).algorithm == "gptq"
    assert QuantizeRequest(calibration=Path("text"), rounding="hqq").algorithm == "hqq"
