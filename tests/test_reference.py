"""The whole way with the trained reference model: export, quantize, run, judged by transformers and a memory cgroup."""

# pyright: reportCallIssue=false, reportOptionalOperand=false

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pocketmoe.bundle.reader import Bundle
from pocketmoe.export.portable.portable import export_portable
from pocketmoe.profiles.calibration.cache_ranges import measure_cache_ranges
from pocketmoe.profiles.quality.quality import evaluate, read_slices
from pocketmoe.quantize.apply import quantize_bundle
from pocketmoe.quantize.graphs.caches import CacheCalibration, find_caches
from pocketmoe.quantize.plan import PLAN, QuantizationPlan
from pocketmoe.runtime.backends.choice import BackendName
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.tokenizer import Text
from tests.cgroup import Limited, run_limited
from tests.export.alone import chosen, run_alone
from tests.test_cli import pocketmoe

pytestmark = pytest.mark.slow

MODEL = Path(__file__).parent.parent / "models" / "reference"
PROMPTS = (
    "She looked out of the window, and",
    "The old man said that he had never",
    "To install the package, run the following",
    "The function returns a list of",
    "def read_file(path):\n    ",
    "import os\n\nclass ",
    "Le programme permet de",
    "Il était une fois",
)
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def bundle(reference_bundle: Callable[[str], Bundle]) -> Bundle:
    return reference_bundle("fp32")


@pytest.fixture(scope="module")
def int4(reference_bundle: Callable[[str], Bundle]) -> Bundle:
    return reference_bundle("int4")


@pytest.fixture(scope="module")
def int8(reference_bundle: Callable[[str], Bundle]) -> Bundle:
    return reference_bundle("int8")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL / "checkpoint", dtype=torch.float32).eval()


def greedy(bundle: Bundle, memory: str, backend: BackendName, threads: int) -> list[list[int]]:
    """`NEW_TOKENS` greedy tokens for each prompt."""
    text = Text(bundle)
    answers: list[list[int]] = []
    with Engine(bundle, EngineOptions(MemoryRequest.parse(memory), 128, threads, backend)) as engine:
        for prompt in PROMPTS:
            engine.reset()
            tokens = [int(np.argmax(engine.feed(text.encode(prompt))))]
            while len(tokens) < NEW_TOKENS:
                tokens.append(int(np.argmax(engine.feed(tokens[-1:]))))
            answers.append(tokens)
    return answers


def test_unquantized_tokens_and_logits_are_those_of_transformers(bundle: Bundle, model: PreTrainedModel) -> None:
    """Eight prompts, 64 greedy tokens each: all the same, at every budget; the logits of held-out text within 1e-3."""
    text = Text(bundle)
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([text.encode(prompt)])
        out = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
        expected.append(out[0, ids.shape[1] :].tolist())
    assert greedy(bundle, "100%", "slots", 2) == expected
    assert greedy(bundle, "20%", "slots", 2) == expected
    for file in sorted((MODEL / "heldout").glob("*.txt")):
        ids = text.encode(file.read_text(encoding="utf-8"))[:256]
        with torch.no_grad():
            wanted = model(torch.tensor([ids])).logits[0].numpy()
        with Engine(bundle, EngineOptions(capacity=256)) as engine:
            assert np.abs(engine.feed(ids, rows="all") - wanted).max() < 1e-3, file.stem


def test_int4_tokens_do_not_depend_on_budget_backend_or_threads(int4: Bundle) -> None:
    """The same greedy tokens at 100%, 50% and 20% of the experts, by slots and by sessions, with 1 and 2 threads.

    Of the twelve settings as many as it takes for each pair of two of them to occur.
    """
    wanted = greedy(int4, "100%", "slots", 1)
    settings: list[tuple[str, BackendName, int]] = [
        ("100%", "sessions", 2),
        ("50%", "slots", 2),
        ("50%", "sessions", 1),
        ("20%", "slots", 1),
        ("20%", "sessions", 2),
    ]
    for memory, backend, threads in settings:
        assert greedy(int4, memory, backend, threads) == wanted, (memory, backend, threads)


def test_the_portable_model_gives_the_same_tokens_alone(int4: Bundle, tmp_path: Path) -> None:
    """As one ONNX model, in a process that has onnxruntime and numpy alone."""
    model = export_portable(int4.root, tmp_path / "reference.onnx").model
    text = Text(int4)
    logits = [run_alone(model, [text.encode(prompt)], NEW_TOKENS, tmp_path) for prompt in PROMPTS]
    assert [chosen(rows, NEW_TOKENS) for rows in logits] == greedy(int4, "100%", "slots", 2)


def test_quantizing_costs_little_and_saves_much(bundle: Bundle, int8: Bundle, int4: Bundle) -> None:
    """Perplexity of every kind of text, one that the model never saw among them: int8 within 0.2%, int4 within 1%."""
    slices = read_slices(MODEL / "heldout")
    checkpoint = (MODEL / "checkpoint" / "model.safetensors").stat().st_size
    for quantized, ratio, share in ((int8, 1.002, 0.62), (int4, 1.01, 0.42)):
        report = evaluate(quantized, slices, reference=bundle, max_tokens=4096)
        for piece in report.slices:
            assert piece.quality.divergence is not None
            assert piece.quality.divergence.perplexity_ratio.value < ratio, piece.name
        assert report.candidate_bytes < share * checkpoint


def test_calibrated_and_mixed_bundles_lose_less_at_the_same_size(bundle: Bundle, int4: Bundle) -> None:
    """On texts that calibration has not seen, one of a kind that nothing has.

    Measured: KL 0.0019 of int4 becomes 0.0013; at the size of uniform 2 bits (blocks of 32), 0.016 becomes 0.006.
    """
    texts, calibration = read_slices(MODEL / "heldout"), MODEL / "calibration.txt"

    def made(name: str, *options: str) -> Bundle:
        target = bundle.root.with_name(name)
        some = ("--calibration", calibration, "--calibration-tokens", "8192")
        done = pocketmoe("quantize", bundle.root, "-o", target, *options, *some)
        assert done.returncode == 0, done.stderr
        return Bundle.open(target)

    def kl(candidate: Bundle) -> dict[str, float]:
        report = evaluate(candidate, texts, reference=bundle, max_tokens=1024)
        found = {piece.name: piece.quality.divergence for piece in report.slices} | {"all": report.overall.divergence}
        return {name: divergence.mean_kl_nats.value for name, divergence in found.items() if divergence is not None}

    plain, calibrated = kl(int4), kl(made("int4-gptq", "--scheme", "int4"))
    int2 = made("int2", "--scheme", "int2")
    size = sum(entry.nbytes for entry in int2.manifest.files.values())
    mixed = made("mixed", "--scheme", "mixed", "--size-budget", f"{size / 1e6}MB")
    assert sum(entry.nbytes for entry in mixed.manifest.files.values()) <= size
    uniform, found = kl(int2), kl(mixed)
    for name in ("all", "ood"):
        assert calibrated[name] < 0.92 * plain[name]
        assert found[name] < 0.6 * uniform[name]
    plan = msgspec.json.decode(mixed.check_file(PLAN).read_bytes(), type=QuantizationPlan)
    assert 0.5 < plan.expected_kl / found["all"] < 2


def test_int8_caches_cost_little(bundle: Bundle, int4: Bundle) -> None:
    """Against the same weights with caches in float32, texts of every kind, four chunks long: a KL of 0.0006 measured.

    The greedy tokens of int8 caches are the same at every budget and backend.
    """
    measured = measure_cache_ranges(int4, find_caches(int4), read_slices(MODEL / "calibration.txt"))
    calibration = CacheCalibration(measured.ranges, measured.source)
    cached = quantize_bundle(int4.root, bundle.root.with_name("int4-kv8"), scheme="keep", caches=calibration)
    overall = evaluate(cached, read_slices(MODEL / "heldout"), reference=int4, max_tokens=1024).overall
    assert overall.divergence is not None
    assert 0 < overall.divergence.mean_kl_nats.value < 0.0015
    assert overall.divergence.perplexity_ratio.value < 1.005
    assert greedy(cached, "100%", "slots", 1) == greedy(cached, "20%", "sessions", 2)


def run_cli(bundle: Path, *options: str) -> list[str]:
    prompt = ("--prompt", PROMPTS[0], "--max-tokens", "40", "--json")
    return [sys.executable, "-m", "pocketmoe.cli", "run", str(bundle), *prompt, *options]


def least_bytes(bundle: Path) -> int:
    """What `run` says would be the least that would do."""
    refused = subprocess.run(run_cli(bundle, "--memory", "1MB"), capture_output=True, text=True, check=False)
    assert refused.returncode == 4, refused.stderr
    found = re.search(r"least that would do is (\d+) MB", refused.stderr)
    assert found, refused.stderr
    return int(found[1]) * 10**6


@pytest.mark.root
@pytest.mark.parametrize("first_use", [True, False], ids=["first use", "packed"])
def test_the_budget_is_kept_under_a_limit_that_kills(int4: Bundle, tmp_path: Path, first_use: bool) -> None:
    """In a memory cgroup of just the least budget, caches cold, the run finishes and never meets the limit's end.

    30 MB below it is refused with exit 4 and the figure; so is a share of the experts kept that was asked for.
    """
    copy = tmp_path / "bundle"
    shutil.copytree(int4.root, copy, ignore=shutil.ignore_patterns("packed"))
    if not first_use:
        subprocess.run(run_cli(copy), check=True, capture_output=True)
    least = least_bytes(copy)
    with open("/proc/sys/vm/drop_caches", "w") as drop:
        drop.write("3")
    kept = limited(copy, least)
    assert kept.returncode == 0, kept.stderr
    report = json.loads(kept.stdout)
    assert report["backend"] == "slots"
    assert report["generated_tokens"] == 40
    assert report["peak_memory_bytes"] <= report["memory_budget_bytes"] == least
    assert kept.peak_bytes <= least
    refused = limited(copy, least - 30 * 10**6)
    assert refused.returncode == 4
    named = re.search(r"least that would do is (\d+) MB", refused.stderr)
    assert named
    assert abs(int(named[1]) * 10**6 - least) < 4 * 10**6
    assert refused.stdout == ""
    share = subprocess.run(run_cli(copy, "--memory", "40%"), capture_output=True, text=True, check=True)
    total = json.loads(share.stdout)["memory_budget_bytes"]
    assert limited(copy, total).returncode == 0


def limited(bundle: Path, limit_bytes: int) -> Limited:
    return run_limited(run_cli(bundle, "--memory", str(limit_bytes)), limit_bytes)


@pytest.mark.parametrize("kind", ["manifest", "graph", "dense", "experts", "tokenizer", "card"])
def test_a_flipped_byte_anywhere_is_named_and_nothing_is_computed(int4: Bundle, tmp_path: Path, kind: str) -> None:
    """One flipped byte in any file: `verify` names the file and exits 3; `run` exits 3 and prints no text."""
    copy = tmp_path / "bundle"
    shutil.copytree(int4.root, copy, ignore=shutil.ignore_patterns("packed"))
    names = {
        "manifest": "manifest.json",
        "graph": "graphs/segment_03.onnx",
        "dense": "graphs/dense.bin",
        "experts": "experts.bin",
        "tokenizer": "tokenizer/tokenizer.json",
        "card": "MODEL_CARD.md",
    }
    path = copy / names[kind]
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0x10
    path.write_bytes(data)
    command = [sys.executable, "-m", "pocketmoe.cli"]
    verify = subprocess.run([*command, "verify", str(copy)], capture_output=True, text=True, check=False)
    assert verify.returncode == 3
    assert os.fspath(Path(names[kind]).name) in verify.stdout + verify.stderr
    run = subprocess.run(run_cli(copy, "--memory", "100%"), capture_output=True, text=True, check=False)
    assert run.returncode == 3, run.stderr
    assert run.stdout == ""
    assert json.loads(run.stderr.splitlines()[-1])["exit_code"] == 3
    assert "Traceback" not in run.stderr
