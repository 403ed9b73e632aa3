"""A checkpoint in several formats at once, exported as it is: codes kept, what cannot be kept dequantized and named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pocketmoe.bundle.reader import Bundle
from pocketmoe.cli import main
from tests import tiny
from tests.export.reference import ReferenceRun
from tests.quantized import Origin, Quantized, awq, bnb4, gptq, quantize_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers loading the tiny models


def mixed(weight: torch.Tensor) -> Quantized:
    """By shape: the head in AWQ, experts' down projections in act-order, k and v in NF4, all else in plain GPTQ."""
    if weight.shape[0] == tiny.VOCAB:
        return awq(4, 32)(weight)
    if weight.shape == (64, 96):
        return gptq(4, 32, act_order=True, index="filled")(weight)
    if weight.shape == (32, 64):
        return bnb4("nf4", 64, True, torch.float16)(weight)
    return gptq(4, 32)(weight)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The bundle, and the checkpoint of plain values."""
    root = tmp_path_factory.mktemp("kept")
    sizes = {
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 32,
        "num_experts": 4,
        "num_hidden_layers": 1,
    }
    source = tiny.save_checkpoint(root / "source", tiny.make_model("qwen2_moe", **sizes))
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
    quantize_checkpoint(source, root / "packed", root / "plain", Origin(mixed, settings, ""))
    result = CliRunner().invoke(main, ["export", str(root / "packed"), "-o", str(root / "bundle")])
    assert result.exit_code == 0, result.output
    return root / "bundle", root / "plain"


def test_codes_are_kept_and_the_rest_is_named(exported: tuple[Path, Path]) -> None:
    manifest = Bundle.open(exported[0]).manifest
    assert [kind.scheme for kind in manifest.expert_kinds] == ["int4-b32-asym + fp32"]
    schemes = {tensor.name: tensor.scheme for tensor in manifest.dense}
    assert {"int4-b32-asym", "fp32"} <= set(schemes.values())
    assert next(scheme for name, scheme in schemes.items() if "lm_head" in name) == "int4-b32-asym"
    note = next(note for note in manifest.notes if "dequantized" in note)
    assert "mlp.experts.down_proj (expert 0)" in note
    origin = str(manifest.provenance.origin)
    assert all(
        word in origin for word in ("GPTQ 4 bits, group 32", "act-order", "AWQ 4 bits", "NF4", "codes kept in part")
    )
    assert origin in (exported[0] / "MODEL_CARD.md").read_text()
    result = CliRunner().invoke(main, ["inspect", str(exported[0]), "--json"])
    assert json.loads(result.stdout)["provenance"]["origin"] == origin


def test_it_answers_as_transformers_does_with_the_plain_values(exported: tuple[Path, Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exported[1], dtype=torch.float32)
    ids = list(range(2, 40))
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0].numpy()
    found = ReferenceRun(Bundle.open(exported[0])).step(ids)
    # products are not rounded to float16 here, as the sources' own libraries do: 2 ** -11 of each weight
    np.testing.assert_allclose(found, wanted, atol=2e-3 * np.abs(wanted).max())
    assert (found.argmax(1) == wanted.argmax(1)).all()
