"""An exported bundle computes what transformers computes; a failed export leaves nothing behind."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import OutputError
from pocketmoe.export.convert import export_checkpoint
from pocketmoe.quantize.apply import Quantizer, quantize_bundle
from tests import bundles
from tests.export.reference import InPlaceRun, ReferenceRun

slow = pytest.mark.slow
ARCHITECTURES = [
    "olmoe",
    *(
        pytest.param(name, marks=slow)
        for name in ("qwen3_moe", "mixtral", "granitemoe", "gpt_oss", "deepseek_v3", "qwen2_moe")
    ),
]
PROMPT = [int(n) for n in np.random.default_rng(0).integers(3, 300, 17)]
TOLERANCE = 1e-4

Make = Callable[[str], Any]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore")  # transformers loading the tiny models
def test_same_logits_and_greedy_tokens_as_transformers(
    model_type: str, tiny_checkpoint: Make, tiny_bundle: Make
) -> None:
    from transformers import AutoModelForCausalLM

    run = ReferenceRun(tiny_bundle(model_type))
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(model_type), dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT]), use_cache=True)
        found = run.step(PROMPT)
        np.testing.assert_allclose(found, expected.logits[0], atol=TOLERANCE)
        for _ in range(8):
            token = int(expected.logits[0, -1].argmax())
            assert int(found[-1].argmax()) == token
            expected = model(torch.tensor([[token]]), past_key_values=expected.past_key_values, use_cache=True)
            found = run.step([token])
            np.testing.assert_allclose(found, expected.logits[0], atol=TOLERANCE)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_text_in_pieces_gives_the_same_logits(model_type: str, tiny_bundle: Make) -> None:
    whole = ReferenceRun(tiny_bundle(model_type)).step(PROMPT)
    run = ReferenceRun(tiny_bundle(model_type))
    pieces = [run.step(PROMPT[:5]), run.step(PROMPT[5:6]), run.step(PROMPT[6:])]
    np.testing.assert_allclose(np.concatenate(pieces), whole, atol=TOLERANCE)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_last_segment_needs_the_last_row_only(model_type: str, tiny_bundle: Make) -> None:
    bundle = tiny_bundle(model_type)
    whole = ReferenceRun(bundle).step(PROMPT)
    last = ReferenceRun(bundle).step(PROMPT, last_row_only=True)
    assert last.shape == (1, bundle.manifest.model.vocab_size)
    np.testing.assert_allclose(last[0], whole[-1], atol=1e-5)


@pytest.mark.parametrize(
    "model_type", ["olmoe", *(pytest.param(name, marks=slow) for name in ("qwen3_moe", "gpt_oss"))]
)
def test_states_in_one_overlong_buffer_give_the_same_logits(model_type: str, tiny_bundle: Make) -> None:
    shared, apart = InPlaceRun(tiny_bundle(model_type), capacity=40), ReferenceRun(tiny_bundle(model_type))
    for tokens in (PROMPT[:11], PROMPT[11:12], PROMPT[12:16], PROMPT[16:]):
        np.testing.assert_allclose(shared.step(tokens), apart.step(tokens), atol=1e-5)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_router_graphs_choose_what_the_segments_choose(model_type: str, tiny_bundle: Make) -> None:
    bundle = tiny_bundle(model_type)
    run = ReferenceRun(bundle)
    run.step(PROMPT)
    for layer in bundle.manifest.moe_layers:
        assert layer.router is not None
        router = ort.InferenceSession(bundle.path(layer.router), providers=["CPUExecutionProvider"])
        ids, weights = router.run(["expert_ids", "expert_weights"], {"x": run.values[layer.x]})
        np.testing.assert_array_equal(ids, run.values[layer.expert_ids])
        np.testing.assert_allclose(np.asarray(weights), run.values[layer.expert_weights], rtol=1e-5)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_manifest_describes_the_bundle(model_type: str, tiny_checkpoint: Make, tiny_bundle: Make) -> None:
    bundle: Bundle = tiny_bundle(model_type)
    manifest = bundle.manifest
    assert list(bundle.verify()) == []
    assert len(manifest.segments) == len(manifest.moe_layers) + 1
    roles = {tensor.role for tensor in manifest.dense}
    assert {"embedding", "attention", "router"} <= roles
    assert ("shared_expert" in roles) == (model_type in {"deepseek_v3", "qwen2_moe"})
    tied = [t for t in manifest.dense if t.role == "embedding"]
    assert len(tied) == 1
    assert ("head" in roles) == (model_type != "qwen3_moe")  # tied: one tensor for both
    for tensor in manifest.dense:
        assert tensor.offset % (4096 if tensor.nbytes >= 4096 else 64) == 0
    assert manifest.provenance.licence == "apache-2.0"
    assert manifest.provenance.base_model == "someone/base"
    source = tiny_checkpoint(model_type) / "model.safetensors"
    assert manifest.provenance.files["model.safetensors"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert "Random weights." in (bundle.root / "MODEL_CARD.md").read_text()
    assert (bundle.root / "tokenizer" / "chat_template.jinja").is_file()


def test_every_product_has_a_constant_matrix(tiny_bundle: Make) -> None:
    """What the quantizer relies on: weights are the second operand of MatMul, [inputs, outputs]."""
    bundle: Bundle = tiny_bundle("olmoe")
    graphs = [s.graph for s in bundle.manifest.segments] + [k.graph for k in bundle.manifest.expert_kinds]
    products = 0
    for name in graphs:
        graph = onnx.load(bundle.path(name).as_posix(), load_external_data=False).graph
        external = {t.name for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
        for node in graph.node:
            assert node.op_type != "Gemm"
            if node.op_type == "MatMul":
                assert node.input[1] in external
                products += 1
    assert products == 4 * 3 + 1 + 2  # qkv, out and router per layer; the head; up and down of an expert


class _Stop(BaseException):
    """Stands for Ctrl-C."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop", [KeyboardInterrupt, _Stop, MemoryError])
def test_an_interrupted_export_leaves_nothing_behind(
    stop: type[BaseException], tiny_checkpoint: Make, tmp_path: Path
) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what == "capturing the graph":
            raise stop

    with pytest.raises(stop):
        export_checkpoint(tiny_checkpoint("olmoe"), tmp_path / "bundle", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from pocketmoe.export.convert import export_checkpoint
from pocketmoe.quantize.apply import Quantizer

def kill(what, done, total):
    if (what, done) == ("quantizing experts", 9):
        os.kill(os.getpid(), signal.SIGKILL)

export_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), quantizer=Quantizer.of("int4"), progress=kill)
"""


@pytest.mark.filterwarnings("ignore")
def test_in_one_go_and_after_a_kill_the_bundle_is_the_same(
    tiny_checkpoint: Make, tiny_bundle: Make, tmp_path: Path
) -> None:
    """Exported and quantized by one call, killed (kill -9) after 9 experts and called again: as export, then quantize.

    Every byte is, but for the time that manifest and card state.
    """
    source, target = tiny_checkpoint("olmoe"), tmp_path / "bundle"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(source), str(target)], capture_output=True, check=False)
    assert killed.returncode == -9
    assert not target.exists()
    steps: list[tuple[str, int, int]] = []
    quantizer = Quantizer.of("int4")
    export_checkpoint(source, target, quantizer=quantizer, progress=lambda *step: steps.append(step))
    assert ("going on where an earlier run was killed", 0, 0) in steps
    assert next(step for step in steps if step[0] == "quantizing experts") == ("quantizing experts", 9, 32)
    assert list(tmp_path.iterdir()) == [target]
    expected = quantize_bundle(tiny_bundle("olmoe").root, tmp_path / "expected", scheme="int4").root
    found, wanted = (bundles.tree(root) for root in (target, expected))
    assert {name for name in found if found[name] != wanted[name]} <= {"manifest.json", "MODEL_CARD.md"}
    assert timeless(target) == timeless(expected)


def timeless(root: Path) -> tuple[str, str]:
    """Manifest and card without the time of the export, and the hashes that follow from it."""
    manifest = Bundle.open(root).manifest
    created = manifest.provenance.created
    files = {name: entry for name, entry in manifest.files.items() if name != "MODEL_CARD.md"}
    provenance = msgspec.structs.replace(manifest.provenance, created="")
    manifest = msgspec.structs.replace(manifest, sha256="", provenance=provenance, files=files)
    return repr(manifest), (root / "MODEL_CARD.md").read_text().replace(created, "")


def test_a_directory_that_is_no_bundle_is_not_replaced(tiny_checkpoint: Make, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(OutputError):
        export_checkpoint(tiny_checkpoint("olmoe"), tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "mine"
