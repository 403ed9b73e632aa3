"""The engine against transformers, and against itself at other budgets, backends and thread counts."""

# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import BadInput, DamagedFile
from pocketmoe.runtime.backends import packing, slots
from pocketmoe.runtime.backends.choice import BackendName
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.engine.statistics import Skipped
from tests.bundles import scratch_folders

CAPACITY = 200
PROMPT_LENGTHS = (1, 2, 17, 40, 100, 129)  # the last one takes two chunks


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[[str], Path]) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint("olmoe"), dtype=torch.float32).eval()


@pytest.fixture
def bundle(tiny_bundle: Callable[[str], Bundle], tmp_path: Path) -> Iterator[Bundle]:
    """A copy that may be packed and damaged."""
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle("olmoe").root, copy, ignore=shutil.ignore_patterns("packed"))
    yield Bundle.open(copy)
    assert not scratch_folders(), "something was left in memory"


def options(memory: str, backend: BackendName = "slots", threads: int = 1) -> EngineOptions:
    return EngineOptions(MemoryRequest.parse(memory), CAPACITY, threads, backend)


def prompts(vocab: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, vocab, size=length).tolist() for length in PROMPT_LENGTHS]


def greedy(engine: Engine, prompt: list[int], count: int) -> list[int]:
    engine.reset()
    tokens = [int(np.argmax(engine.feed(prompt)))]
    while len(tokens) < count:
        tokens.append(int(np.argmax(engine.feed(tokens[-1:]))))
    return tokens


def test_greedy_tokens_and_logits_are_those_of_transformers(bundle: Bundle, model: PreTrainedModel) -> None:
    """Six prompts of 1 to 129 tokens: 24 greedy tokens each the same, and every logit of a prompt within 1e-4."""
    with Engine(bundle, options("60%")) as engine:
        for prompt in prompts(model.config.vocab_size):
            ids = torch.tensor([prompt])
            with torch.no_grad():
                expected = model(ids).logits[0].numpy()
                wanted = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
            engine.reset()
            assert np.abs(engine.feed(prompt, rows="all") - expected).max() < 1e-4
            assert greedy(engine, prompt, 24) == wanted[0, len(prompt) :].tolist()


def test_same_bits_at_every_budget_backend_and_thread_count(bundle: Bundle) -> None:
    """Logits of a text are equal to the bit, with all experts in memory, half, and the least, slots and sessions."""
    text = prompts(bundle.manifest.model.vocab_size)[-1]
    wanted = None
    for memory in ("100%", "50%", "1%"):
        for backend in ("slots", "sessions"):
            for threads in (1, 2):
                with Engine(bundle, options(memory, backend, threads)) as engine:
                    logits = np.concatenate([engine.feed(text, rows="all"), engine.feed([7], rows="all")])
                    assert engine.opened.backend == backend
                wanted = logits if wanted is None else wanted
                assert np.array_equal(logits, wanted), (memory, backend, threads)


def test_chunks_that_walk_together_change_no_bit_and_read_less(bundle: Bundle) -> None:
    """A prompt of many chunks with half the memory: the same logits as chunk by chunk, and fewer experts read."""
    rng = np.random.default_rng(1)
    size, text = 8, rng.integers(2, bundle.manifest.model.vocab_size, 228).tolist()
    alone = [text[start : start + size] for start in range(0, len(text), size)]
    logits, misses = [], []
    for feeds in (alone, [text]):
        with Engine(bundle, EngineOptions(MemoryRequest.parse("50%"), len(text) + 1, chunk=size)) as engine:
            logits.append(np.concatenate([engine.feed(part, rows="all") for part in (*feeds, [7])]))
            misses.append(engine.stats.misses)
    assert np.array_equal(*logits)
    assert misses[0] > misses[1]


def test_prefetches_change_no_bit(bundle: Bundle) -> None:
    """With the next layer's experts prefetched at every step, or never, the same logits; most predictions are right."""
    tokens = prompts(bundle.manifest.model.vocab_size)[2]
    found = []
    for prefetch in ("on", "off"):
        with Engine(bundle, replace(options("50%"), prefetch=prefetch)) as engine:
            found.append(np.concatenate([engine.feed([token]) for token in tokens]))
            assert (engine.stats.prefetches > 0) == (prefetch == "on")
            assert not engine.predictions.precision_by_rank or engine.predictions.precision_by_rank[0] > 0.5
    assert np.array_equal(*found)


def test_dropping_cold_experts_leaves_out_only_what_is_light_and_absent(bundle: Bundle) -> None:
    """With everything in memory nothing is dropped and the logits are exact; at the least budget some weight is."""
    tokens = prompts(bundle.manifest.model.vocab_size)[3]
    with Engine(bundle, options("100%")) as engine:
        engine.feed(list(range(2, 130)))
        engine.reset()
        exact = np.concatenate([engine.feed([token]) for token in tokens])
    for memory, drops in (("100%", False), ("1%", True)):
        with Engine(bundle, replace(options(memory), drop_cold=1.0)) as engine:
            engine.feed(list(range(2, 130)))
            engine.reset()
            engine.skipped = Skipped()
            found = np.concatenate([engine.feed([token]) for token in tokens])
        assert np.array_equal(found, exact) != drops
        assert 0 < engine.skipped.share < 0.5 if drops else not engine.skipped.choices


def test_row_wanted_is_row_of_all(bundle: Bundle) -> None:
    """The last token's logits alone are those of the last row of all; `none` gives no row and moves on."""
    text = prompts(bundle.manifest.model.vocab_size)[3]
    with Engine(bundle, options("50%")) as engine:
        every = engine.feed(text, rows="all")
        engine.reset()
        assert engine.feed(text[:-1], rows="none").shape == (0, every.shape[1])
        assert np.allclose(engine.feed(text[-1:])[0], every[-1], atol=1e-5)


def test_a_text_longer_than_the_states_is_refused(bundle: Bundle) -> None:
    """Neither a capacity beyond the context nor a text beyond the capacity is cut short silently."""
    with pytest.raises(BadInput, match="context"):
        Engine(bundle, EngineOptions(capacity=bundle.manifest.model.context_length + 1))
    with Engine(bundle, options("50%")) as engine, pytest.raises(BadInput, match="do not fit"):
        engine.feed([3] * (CAPACITY + 1))


@pytest.mark.parametrize("backend", ["slots", "sessions"])
def test_a_damaged_expert_is_refused_when_it_is_first_paged_in(bundle: Bundle, backend: BackendName) -> None:
    """One flipped byte in one expert's record: the run that needs it ends with the file's and the expert's name."""
    with bundle.open_store() as store:
        record = store.records[(1, 2)]
    path = bundle.root / "experts.bin"
    data = bytearray(path.read_bytes())
    data[record.offset + record.nbytes // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedFile, match=r"experts\.bin: the record of layer 1, expert 2"):  # noqa: SIM117
        with Engine(bundle, options("100%", backend)) as engine:
            engine.feed(list(range(2, 130)))


@pytest.mark.parametrize("by", ["the disk", "somebody"])
def test_damaged_packed_experts_are_packed_again(bundle: Bundle, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flipped byte in any file of the packed folder never computes: what is packed is made anew, the same tokens."""
    if by == "the disk":
        monkeypatch.setattr(packing, "changed_ns", lambda _: 1)
    with Engine(bundle, options("100%")) as engine:
        wanted = greedy(engine, [5, 6, 7], 8)
    folder = bundle.root / "packed" / packing.device_key(bundle)
    for file in sorted(folder.iterdir()):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        if file.name == "experts.bin" and by == "the disk":  # found when the expert is paged in
            with pytest.raises(DamagedFile) as damage, Engine(bundle, options("100%")) as engine:
                engine.feed(list(range(2, 130)))
            assert "Run it again" in damage.value.one_line()
        with Engine(bundle, options("100%")) as engine:
            assert greedy(engine, [5, 6, 7], 8) == wanted, file.name
            assert engine.opened.backend == "slots"


def test_a_bundle_that_cannot_be_written_runs_in_sessions(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is nowhere to pack to, sessions are used, and the engine says why."""

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(slots, "pack", refuse)
    with Engine(bundle, EngineOptions(MemoryRequest.parse("50%"), CAPACITY)) as engine:
        assert engine.opened.backend == "sessions"
        assert "Permission denied" in engine.opened.backend_reason
        assert len(greedy(engine, [5, 6], 4)) == 4
