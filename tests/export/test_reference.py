"""The checkpoint itself as a reference: what transformers gives, and a bundle that is nearly that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pocketmoe.bundle.inspection import equivalence_words, inspect_bundle
from pocketmoe.bundle.reader import Bundle
from pocketmoe.cli import main
from pocketmoe.errors import BadInput
from pocketmoe.export.reference import TransformersModel
from tests import tiny

IDS = [5, 9, 2, 7, 30, 41, 8, 3, 17, 22]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("olmoe")


def test_it_gives_the_logits_of_transformers_however_a_text_is_fed(checkpoint: Path) -> None:
    """In one piece, in pieces and token by token, after a reset too: those of one call of the model."""
    from transformers import AutoModelForCausalLM

    model = TransformersModel(checkpoint, threads=1)
    with torch.inference_mode():
        truth = AutoModelForCausalLM.from_pretrained(checkpoint).eval()(torch.tensor([IDS])).logits[0].numpy()
    for pieces in ([IDS], [IDS[:4], IDS[4:5], IDS[5:]], [[token] for token in IDS]):
        model.reset()
        found = np.concatenate([model.feed(piece, rows="all") for piece in pieces])
        np.testing.assert_allclose(found, truth, atol=1e-4)
    model.reset()
    np.testing.assert_allclose(model.feed(IDS), truth[-1:], atol=1e-4)


def test_a_bundle_is_compared_with_its_checkpoint(
    checkpoint: Path, tiny_bundle: Callable[[str], Bundle], tmp_path: Path
) -> None:
    """It strays by nothing that matters; the record has the checkpoint's seal and that its files made the bundle.

    A gate that asks for routers, which transformers does not tell, fails; the others hold.
    """
    text, gate = tmp_path / "text.txt", tmp_path / "gate"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    gate.write_text("mean_kl <= 1e-6\nperplexity_ratio <= 1.0001\nrouter >= 0.5\n")
    command = ["eval", str(tiny_bundle("olmoe").root), "--reference", str(checkpoint), "--text", str(text)]
    command += ["--max-tokens", "100", "--free", "1", "--gate", str(gate)]
    done = CliRunner().invoke(main, [*command, "--json", "-o", str(tmp_path / "out")])
    assert done.exit_code == 5, done.output
    record = json.loads((tmp_path / "out" / "eval.json").read_text())
    reference = record["reference"]
    assert reference["path"] == str(checkpoint)
    assert len(reference["seal"]) == 64
    assert reference["seal"] == record["report"]["reference_sha256"]
    assert "these very files" in reference["steps"][0]
    assert "transformers" in reference["schemes"]["computed by"]
    assert record["report"]["overall"]["divergence"]["top1_agreement"]["value"] == 1.0
    assert record["report"]["overall"]["free_running"]["same_tokens"]["value"] == 1.0
    assert "these very files" in (tmp_path / "out" / "eval.html").read_text()
    assert [verdict["metric"] for verdict in record["verdicts"] if not verdict["passed"]] == ["router"]
    refused = CliRunner().invoke(main, [*command, "--memory", "1GB"])
    assert refused.exit_code == 3
    assert "cannot be kept" in refused.output


def test_what_transformers_cannot_run_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    other = tiny.save_checkpoint(tmp_path / "other", tiny.make_model("olmoe"))
    (other / "tokenizer.json").write_text("{}")
    (other / "tokenizer_config.json").write_text("{}")
    with pytest.raises(BadInput, match="cannot be run by transformers"):
        TransformersModel(other, threads=1)


def test_export_keeps_how_experts_were_held_against_transformers(tiny_bundle: Callable[[str], Bundle]) -> None:
    """In the manifest, in `inspect` and in the card; a bundle that does not say it is still a bundle."""
    bundle = tiny_bundle("olmoe")
    provenance = bundle.manifest.provenance
    found = provenance.equivalence
    assert found is not None
    assert (found.kinds, found.experts, found.rows) == (1, 2, 6)
    assert 0 < found.error_below <= found.tolerance == 1e-4
    words = equivalence_words(provenance)
    assert "2 experts of 1 kind by graph" in words
    assert inspect_bundle(bundle).equivalence == words
    assert words in bundle.path("MODEL_CARD.md").read_text()
    assert equivalence_words(msgspec.structs.replace(provenance, equivalence=None)) == ""
