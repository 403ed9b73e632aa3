"""GGUF files: read as the gguf package dequantizes them, codes and all; what is not whole is refused in one line."""

# pyright: reportArgumentType=false, reportUnknownMemberType=false

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from pocketmoe.bundle.progress import no_progress
from pocketmoe.errors import BadInput, PocketMoEError, UnsupportedModel
from pocketmoe.export.checkpoint.checkpoint import Checkpoint
from pocketmoe.export.checkpoint.gguf import as_directory
from pocketmoe.export.checkpoint.weights import load_model
from pocketmoe.export.tensors.gguf import read_header
from tests import gguf_file, tiny
from tests.export.tensors.test_published import assert_equal, read

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A file, and the checkpoint of plain values."""
    root = tmp_path_factory.mktemp("gguf")
    model = tiny.make_model("qwen3_moe", num_experts=3, num_hidden_layers=1)
    tiny.save_checkpoint(root / "source", model)
    gguf_file.write(root / "source", root / "tiny.gguf", root / "plain")
    return root / "tiny.gguf", root / "plain"


def test_blocks_mean_what_the_gguf_package_says(made: tuple[Path, Path], tmp_path: Path) -> None:
    file, plain = made
    with as_directory(file, tmp_path, no_progress) as root:
        checkpoint = Checkpoint(root)
        assert root.name == "tiny"
        assert_equal(read(root), read(plain))
        assert load_model(checkpoint)[1].unused == []
        assert checkpoint.origin == "GGUF Q4_0 (12 weights); GGUF Q8_0 (1 weights); GGUF Q4_1 (1 weights)"
        kept = checkpoint.packed["model.layers.0.mlp.experts.2.up_proj.weight"]
        grid = kept.make(checkpoint.shards.read)
        assert kept.keepable(checkpoint.shards.read)
        assert torch.equal(grid.numbers(slice(None)) * grid.spread(grid.scales.float()), grid.dequantize())
        assert not checkpoint.packed["model.layers.0.self_attn.v_proj.weight"].keepable(checkpoint.shards.read)
        assert (root / "tokenizer.json").exists()
    assert [*tmp_path.iterdir()] == []


def test_minimax_is_what_transformers_reads(tmp_path: Path) -> None:
    """Names, the router's bias, rotary width and experts' width: the same logits by its own reading of the file."""
    config = {**tiny.CONFIGS["mixtral"], "num_local_experts": 3, "head_dim": 32, "rotary_dim": 16}
    source = tmp_path / "source"
    tiny.save_checkpoint(source, tiny.randomize(AutoConfig.for_model("minimax_m2", **config)))
    gguf_file.write(source, tmp_path / "tiny.gguf", tmp_path / "plain", "minimax-m2")
    with as_directory(tmp_path / "tiny.gguf", tmp_path, no_progress) as root:
        assert_equal(read(root), read(tmp_path / "plain"))
        assert load_model(Checkpoint(root))[1].unused == []
        ours = AutoModelForCausalLM.from_pretrained(
            tmp_path / "plain", config=AutoConfig.from_pretrained(root), dtype=torch.float32
        )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 100, 200, 33]])
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_other_architectures_are_refused_by_name(made: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(made[0].read_bytes().replace(b"qwen3moe", b"qwen9moe"))
    with pytest.raises(UnsupportedModel, match="qwen9moe"), as_directory(other, tmp_path, no_progress):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["other.gguf"]


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_hostile_header_is_one_line(data: st.DataObject, made: tuple[Path, Path], tmp_path: Path) -> None:
    """Numbers changed to extremes, the file cut: a header that holds, or a refusal, and nothing allocated by it."""
    whole = bytearray(made[0].read_bytes())
    n_header = read_header(made[0]).tensors[0].offset
    if data.draw(st.booleans()):
        del whole[data.draw(st.integers(20, len(whole) - 1)) :]
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(4, min(n_header, len(whole)) - 1))
        number = data.draw(st.sampled_from([0, 1, 255, (1 << 31) - 1, 1 << 32, (1 << 63) - 1, (1 << 64) - 1]))
        whole[place : place + 8] = struct.pack("<Q", number)[: max(0, len(whole) - place)]
    path = tmp_path / "changed.gguf"
    path.write_bytes(whole)
    header, error = None, None
    try:
        header = read_header(path)
    except PocketMoEError as raised:
        error = raised
    if header is None:
        assert error is not None
        assert error.exit_code == 3
        assert "\n" not in error.one_line()
        return
    ends = [tensor.offset + tensor.nbytes for tensor in header.tensors]
    assert max(ends, default=0) <= len(whole)
    assert all(np.prod(tensor.shape, dtype=object) <= 2 * 8 * len(whole) for tensor in header.tensors)


def test_tensors_that_share_their_bytes_are_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    whole = bytearray(made[0].read_bytes())
    name = b"blk.0.attn_k.weight"
    place = whole.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4 + 16 + 4
    whole[place : place + 8] = struct.pack("<Q", 0)
    (tmp_path / "overlap.gguf").write_bytes(whole)
    with pytest.raises(BadInput, match="no room for tensor"):
        read_header(tmp_path / "overlap.gguf")
