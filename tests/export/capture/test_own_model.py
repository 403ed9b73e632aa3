"""A model that is not in transformers takes part by a registration; the example is the one in docs/OWN_MODEL.md."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import UnsupportedModel
from pocketmoe.export.capture import expert_form
from pocketmoe.export.checkpoint.checkpoint import Checkpoint
from pocketmoe.export.checkpoint.weights import load_model
from pocketmoe.export.convert import export_checkpoint
from pocketmoe.export.cut.experts import prepare_experts
from tests import tiny
from tests.export.reference import ReferenceRun

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers loading the tiny model

PAGE = Path(__file__).parents[3] / "docs" / "OWN_MODEL.md"
PROMPT = [int(n) for n in np.random.default_rng(0).integers(3, 300, 17)]


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """The names that the page's code defines, after it has run."""
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    module = sys.modules["own_model"] = ModuleType("own_model")
    exec(code[1], vars(module))
    return vars(module)


@pytest.fixture(scope="module")
def checkpoint(example: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = example["OwnConfig"](**{**tiny.CONFIGS["llama"], "intermediate_size": 48})
    return tiny.save_checkpoint(tmp_path_factory.mktemp("own"), tiny.randomize(config))


def test_the_example_exports_and_computes_the_same(checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    bundle: Bundle = export_checkpoint(checkpoint, tmp_path / "bundle")
    assert [layer.n_experts for layer in bundle.manifest.moe_layers] == [8, 8]
    assert len(bundle.manifest.expert_kinds) == 1
    assert not [tensor.name for tensor in bundle.manifest.dense if ".experts." in tensor.name]
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    run, text = ReferenceRun(bundle), list(PROMPT)
    found = run.step(text)
    for _ in range(4):
        with torch.no_grad():
            expected = model(torch.tensor([text])).logits[0].numpy()
        np.testing.assert_allclose(found, expected[-len(found) :], atol=1e-4)
        text.append(int(expected[-1].argmax()))
        found = run.step(text[-1:])


@pytest.mark.parametrize("lie", ["compute", "forward"])
def test_a_form_that_does_not_say_what_the_module_does_is_refused(
    lie: str, example: dict[str, Any], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"own_model.{example['Mixture'].__qualname__}"
    form = expert_form.REGISTERED[name]

    def compute(module: Any, tensors: Any, x: torch.Tensor) -> torch.Tensor:
        return form.compute(module, tensors, x) * 1.01

    def forward(module: Any, experts: Any, x: torch.Tensor) -> torch.Tensor:
        assert form.forward is not None
        return form.forward(module, experts, x) + 0.01

    lying = dataclasses.replace(form, **{lie: {"compute": compute, "forward": forward}[lie]})
    monkeypatch.setitem(expert_form.REGISTERED, name, lying)
    _, weights, experts = load_model(Checkpoint(checkpoint))
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.0\.mlp"):
        prepare_experts([*experts.values()], weights, tmp_path)
    assert not list(tmp_path.iterdir())
