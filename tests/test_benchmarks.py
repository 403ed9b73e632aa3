"""Benchmarks: each says what it takes, without what only its run needs, and stands in their README."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if "ArgumentParser(" in path.read_text("utf-8"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_says_what_it_takes(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--help` ends with exit code 0, also where peers such as llama.cpp are not installed."""
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.syspath_prepend(str(FOLDER))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert not ended.value.code
    assert capsys.readouterr().out.startswith(f"usage: {script.name}")


def test_the_readme_names_every_benchmark() -> None:
    """In its table, or among what they are made of."""
    text = (FOLDER / "README.md").read_text("utf-8")
    assert [path.name for path in FOLDER.glob("*.py") if f"`{path.name}`" not in text] == []


@pytest.mark.filterwarnings("ignore")  # gguf's reader writes into numpy's shapes
def test_llamacpps_file_of_a_gpt_oss_has_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts in MXFP4, read by the gguf package, are what transformers makes of the checkpoint."""
    import gguf
    import torch
    from safetensors.torch import save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    monkeypatch.syspath_prepend(str(FOLDER))
    from gguf_file import NAME, write_gguf  # type: ignore[import-not-found]
    from make_checkpoint import SHAPES, Mxfp4, gpt_oss_tensors  # type: ignore[import-not-found]

    monkeypatch.setattr(Mxfp4, "POOL", 1 << 16)
    small = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    small |= {"head_dim": 16, "num_hidden_layers": 1, "num_local_experts": 3, "vocab_size": 300}
    config, generator = SHAPES["gpt-oss-20b"] | small, torch.Generator().manual_seed(0)
    held = dict(gpt_oss_tensors(config, 0, generator, Mxfp4(generator)))
    table = torch.randn(300, 64, generator=generator)
    held |= {"model.embed_tokens.weight": table, "lm_head.weight": table.clone(), "model.norm.weight": torch.ones(64)}
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")

    found = {tensor.name: tensor for tensor in gguf.GGUFReader(write_gguf(tmp_path)).tensors}

    assert (tmp_path / NAME).is_file()
    experts = "model.layers.0.mlp.experts."
    for ours, theirs in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
        blocks, scales = held[f"{experts}{ours}_blocks"], held[f"{experts}{ours}_scales"]
        weights = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).mT.numpy()  # [experts, rows, columns]
        for number, part in enumerate(theirs):
            tensor, bias = found[f"blk.0.ffn_{part}_exps.weight"], found[f"blk.0.ffn_{part}_exps.bias"]
            assert tensor.tensor_type == gguf.GGMLQuantizationType.MXFP4
            rows = slice(number, None, len(theirs))
            np.testing.assert_array_equal(gguf.dequantize(tensor.data, tensor.tensor_type), weights[:, rows])
            np.testing.assert_array_equal(bias.data, held[f"{experts}{ours}_bias"].float().numpy()[:, rows])
    sinks = held["model.layers.0.self_attn.sinks"].float().numpy()
    np.testing.assert_array_equal(found["blk.0.attn_sinks.weight"].data, sinks)
    assert found["blk.0.attn_q.weight"].tensor_type == gguf.GGMLQuantizationType.Q4_0
