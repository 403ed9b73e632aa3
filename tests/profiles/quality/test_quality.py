"""Evaluation of bundles, against transformers on the same tiny checkpoint."""

# pyright: reportArgumentType=false

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest

from pocketmoe.bundle.manifest import MANIFEST, STORE
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import StoreWriter
from pocketmoe.bundle.writer import BundleWriter
from pocketmoe.errors import BadInput, BudgetTooSmall
from pocketmoe.profiles.quality import scoring
from pocketmoe.profiles.quality.quality import Slice, evaluate, read_slices
from pocketmoe.profiles.quality.report import Quality, QualityReport
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.tokenizer import Text

FACTOR = 1.25  # what the candidate's experts are multiplied by
WINDOW = 64
ONE = Slice("one", "Once upon a time there was a little girl who lived in a village near the forest. " * 6)
TWO = Slice("two", "The quick brown fox jumps over the lazy dog; Zürich, naïve, 12345 mixtures of experts. " * 5)


@pytest.fixture(scope="module")
def reference(tiny_bundle: Callable[[str], Bundle]) -> Bundle:
    pytest.importorskip("torch")
    return tiny_bundle("olmoe")


@pytest.fixture(scope="module")
def candidate(reference: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The reference with every expert's weights multiplied by FACTOR."""
    target = tmp_path_factory.mktemp("quality") / "candidate"
    with BundleWriter(target) as writer, reference.open_store() as store:
        for name in reference.manifest.files:
            if name != STORE:
                (writer.root / name).parent.mkdir(exist_ok=True)
                (writer.root / name).write_bytes(reference.path(name).read_bytes())
        with StoreWriter(writer.root / STORE) as out:
            for expert, record in store.records.items():
                weights = np.frombuffer(store.read(expert), np.float32)
                out.append(expert, record.kind, (weights * np.float32(FACTOR)).tobytes())
            index = out.close()
        return writer.publish(msgspec.structs.replace(reference.manifest, store_index_sha256=index))


@pytest.fixture(scope="module")
def report(reference: Bundle, candidate: Bundle) -> QualityReport:
    return evaluate(candidate, [ONE, TWO], reference=reference, window=WINDOW)


class Truth(NamedTuple):
    """What transformers says, each [tokens] but the last, [layers]."""

    reference_nll: np.ndarray
    candidate_nll: np.ndarray
    kl: np.ndarray
    same_top1: np.ndarray
    shared_experts: np.ndarray


@pytest.fixture(scope="module")
def truth(tiny_checkpoint: Callable[[str], Path], reference: Bundle) -> dict[str, Truth]:
    import torch
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(tiny_checkpoint("olmoe")).eval() for _ in range(2)]
    with torch.no_grad():
        for name, parameter in models[1].named_parameters():
            if ".experts." in name:
                parameter.mul_(FACTOR)
    text = Text(reference)
    return {piece.name: _true_scores(models, text.encode(piece.text)) for piece in (ONE, TWO)}


def _true_scores(models: list[Any], ids: list[int]) -> Truth:
    import torch
    from torch.nn import functional

    columns: list[list[Any]] = [[] for _ in Truth._fields]
    top_k = models[0].config.num_experts_per_tok
    for start in range(0, len(ids) - 1, WINDOW):
        window = torch.tensor([ids[start : start + WINDOW]])
        with torch.no_grad():
            outputs = [model(window, output_router_logits=True) for model in models]
        log_p, log_q = (functional.log_softmax(output.logits[0, :-1].double(), -1) for output in outputs)
        targets = window[0, 1:]
        columns[0].append(functional.nll_loss(log_p, targets, reduction="none"))
        columns[1].append(functional.nll_loss(log_q, targets, reduction="none"))
        columns[2].append(functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))
        columns[3].append(log_p.argmax(-1) == log_q.argmax(-1))
        routes = [[router[:-1].topk(top_k).indices.tolist() for router in o.router_logits] for o in outputs]
        shares = [
            [len({*ours} & {*theirs}) / top_k for ours, theirs in zip(*layer, strict=True)]
            for layer in zip(*routes, strict=True)
        ]
        columns[4].append(torch.tensor(shares).T)
    return Truth(*(torch.cat(column).numpy() for column in columns))


def test_agrees_with_transformers(report: QualityReport, truth: dict[str, Truth]) -> None:
    for found, expected in zip(report.slices, truth.values(), strict=True):
        _check(found.quality, expected)
    _check(report.overall, Truth(*(np.concatenate(column) for column in zip(*truth.values(), strict=True))))
    assert [piece.name for piece in report.slices] == list(truth)


def _check(found: Quality, expected: Truth) -> None:
    divergence = found.divergence
    assert divergence is not None
    assert divergence.router_agreement is not None
    assert found.scored_tokens == len(expected.kl)
    assert found.perplexity.value == pytest.approx(np.exp(expected.candidate_nll.mean()), rel=1e-3)
    assert divergence.reference_perplexity.value == pytest.approx(np.exp(expected.reference_nll.mean()), rel=1e-3)
    ratio = np.exp((expected.candidate_nll - expected.reference_nll).mean())
    assert divergence.perplexity_ratio.value == pytest.approx(ratio, rel=1e-3)
    assert divergence.mean_kl_nats.value == pytest.approx(expected.kl.mean(), rel=1e-3)
    p99 = np.quantile(expected.kl, 0.99, method="inverted_cdf")
    assert divergence.p99_kl_nats.value == pytest.approx(p99, rel=1e-2)
    assert divergence.top1_agreement.value == pytest.approx(expected.same_top1.mean())
    assert divergence.router_agreement_by_layer == pytest.approx(expected.shared_experts.mean(axis=0), abs=1e-6)
    assert divergence.router_agreement.value == pytest.approx(expected.shared_experts.mean(), abs=1e-6)
    assert divergence.router_agreement.value < 1  # else the test shows nothing


def test_intervals_hold_the_value_and_the_report_is_json(report: QualityReport) -> None:
    parsed = json.loads(json.dumps(msgspec.to_builtins(report), allow_nan=False))
    figures = parsed["overall"]["divergence"]
    figures |= {name: parsed["overall"][name] for name in ("perplexity", "bits_per_byte")}
    figures.pop("router_agreement_by_layer")
    for figure in figures.values():
        assert figure["low"] <= figure["value"] <= figure["high"]
    assert figures["perplexity"]["low"] < figures["perplexity"]["high"]


def test_bits_per_byte(reference: Bundle, report: QualityReport) -> None:
    """Bits per token, less by as many bytes as a token has."""
    piece = report.slices[1]
    bytes_per_token = len(TWO.text.encode()) / len(Text(reference).encode(TWO.text))
    bits_per_token = np.log2(piece.quality.perplexity.value)
    assert piece.quality.bits_per_byte.value == pytest.approx(bits_per_token / bytes_per_token)


def test_touched_bytes(reference: Bundle, report: QualityReport) -> None:
    """Of an OLMoE in float32: two of each layer's eight experts, a row of the embedding, all else that is dense."""
    manifest = reference.manifest
    experts = 2 * len(manifest.moe_layers) * manifest.expert_kinds[0].nbytes
    dense = sum(tensor.nbytes for tensor in manifest.dense if tensor.role != "embedding")
    assert report.candidate_touched_bytes_per_token == experts + dense + 4 * manifest.model.hidden_size
    assert report.reference_touched_bytes_per_token == report.candidate_touched_bytes_per_token


def test_a_bundle_is_its_own_equal(reference: Bundle) -> None:
    """Bit for bit, although one pages and the other does not, and across chunks of a long window."""
    options = EngineOptions(memory=MemoryRequest.parse("30%"), threads=2)
    report = evaluate(reference, [TWO], reference=reference, options=options, window=10_000)
    found = report.overall.divergence
    assert report.window_tokens == reference.manifest.model.context_length > scoring.CHUNK
    assert found is not None
    assert found.mean_kl_nats.value == found.p99_kl_nats.value == 0
    assert found.perplexity_ratio.value == found.top1_agreement.value == 1
    assert set(found.router_agreement_by_layer) == {1.0}


def test_alone_and_with_company_are_the_same(candidate: Bundle, report: QualityReport) -> None:
    alone = evaluate(candidate, [ONE, TWO], window=WINDOW)
    assert alone.overall.perplexity == report.overall.perplexity
    assert alone.overall.divergence is None


def test_max_tokens_and_progress(candidate: Bundle) -> None:
    seen: list[tuple[int, int]] = []
    report = evaluate(
        candidate,
        [ONE, TWO],
        window=16,
        max_tokens=33,
        progress=lambda what, done, total: seen.append((done, total)) if what == "evaluating" else None,
    )
    assert [piece.quality.scored_tokens for piece in report.slices] == [30, 30]  # two windows, one token left over
    assert seen[-1] == (4, 4)


def test_a_budget_for_two_is_kept_or_refused(reference: Bundle, candidate: Bundle) -> None:
    def ask(total_bytes: int) -> None:
        options = EngineOptions(memory=MemoryRequest(total_bytes=total_bytes))
        evaluate(candidate, [TWO], reference=reference, options=options, window=WINDOW)

    with pytest.raises(BudgetTooSmall) as refusal:
        ask(1_000_000)
    assert refusal.value.budget_bytes == 1_000_000
    ask(refusal.value.least_bytes + 20_000_000)


@pytest.mark.parametrize("text", ["", "a"])
def test_too_short_a_text(reference: Bundle, text: str) -> None:
    with pytest.raises(BadInput, match="short: the text has fewer than 2 tokens"):
        evaluate(reference, [ONE, Slice("short", text)])


def test_bundles_of_different_vocabularies(reference: Bundle, candidate: Bundle, tmp_path: Path) -> None:
    tokenizer = json.loads((reference.root / "tokenizer/tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    other = tmp_path / "other"
    with BundleWriter(other) as writer:
        for name in candidate.manifest.files:
            (writer.root / name).parent.mkdir(exist_ok=True)
            (writer.root / name).write_bytes(candidate.path(name).read_bytes())
        (writer.root / "tokenizer/tokenizer.json").write_text(json.dumps(tokenizer))
        bundle = writer.publish(candidate.manifest)
    with pytest.raises(BadInput, match="different vocabularies"):
        evaluate(bundle, [ONE], reference=reference)
    smaller = msgspec.structs.replace(candidate.manifest.model, vocab_size=511)
    bundle.manifest = msgspec.structs.replace(candidate.manifest, model=smaller)
    with pytest.raises(BadInput, match="different vocabularies"):
        evaluate(bundle, [ONE], reference=reference)


def test_logits_that_are_not_numbers(reference: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def feed_nan(_engine: object, tokens: list[int], rows: str) -> np.ndarray:
        return np.full((len(tokens), 512), np.nan, np.float32)

    monkeypatch.setattr(scoring.Engine, "feed", feed_nan)
    with pytest.raises(BadInput, match="not finite"):
        evaluate(reference, [ONE])


def test_read_slices(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("Zürich\r\n".encode())
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "notes.md").write_text("not a slice")
    assert read_slices(tmp_path) == [Slice("a", "a"), Slice("b", "Zürich\r\n")]
    assert read_slices(tmp_path / "b.txt") == [Slice("b", "Zürich\r\n")]
    (tmp_path / "c.txt").write_bytes(b"abc\xff")
    with pytest.raises(BadInput, match=r"c\.txt is not UTF-8 text \(byte 3\)"):
        read_slices(tmp_path)
    with pytest.raises(BadInput, match="cannot be read"):
        read_slices(tmp_path / MANIFEST)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"no \*\.txt files"):
        read_slices(tmp_path / "empty")


def test_routing_by_what_is_in_memory_is_measured_against_exact_routing(reference: Bundle, tmp_path: Path) -> None:
    """A bundle against itself: no divergence with room for all, some with little; nothing that a kill could resume."""
    for option in ({"drop_cold": 1.0}, {"prefer_cached": 1.0}):
        found = {}
        for memory in ("20%", "100%"):
            options = EngineOptions(memory=MemoryRequest.parse(memory), prefetch="off", **option)
            report = evaluate(reference, [ONE], reference=reference, options=options, window=WINDOW, max_tokens=WINDOW)
            assert report.overall.divergence is not None
            found[memory] = report.overall.divergence
        assert found["20%"].mean_kl_nats.value > 0.001
        if "prefer_cached" in option:  # --drop-cold also leaves out what has not been read yet
            assert found["20%"].router_agreement.value < 0.99
            assert found["100%"].mean_kl_nats.value < 1e-9
        with pytest.raises(BadInput, match="depends on what ran before"):
            evaluate(reference, [ONE], options=options, journal=tmp_path / "journal")
