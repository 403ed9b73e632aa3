"""A bundle behind transformers' `generate`: the tokens of transformers' own model, in every way that is offered."""

# pyright: reportArgumentType=false

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)

from pocketmoe.bundle.manifest import MANIFEST
from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import BadInput, BudgetTooSmall, PocketMoEError
from pocketmoe.integrations.optimum import PocketMoEForCausalLM
from pocketmoe.integrations.texts import TextsCache
from tests.bundles import tree
from tests.hang import HANG_S
from tests.hub.server import WritableHub
from tests.integrations.conftest import reference_of

PROMPT = "The quick brown fox jumps over the lazy dog. "
VOCAB = 250  # below it, and above the special tokens 0 and 1
texts = st.lists(st.lists(st.integers(2, VOCAB), min_size=1, max_size=40), min_size=1, max_size=3)


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """A batch, padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[1] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def encoded(tokenizer: Any, *prompts: str) -> dict[str, torch.Tensor]:
    found = tokenizer([*prompts], return_tensors="pt", padding=True)
    return {name: found[name] for name in ("input_ids", "attention_mask")}


@settings(max_examples=5, deadline=None)
@given(rows=texts)
def test_tokens_and_logits_are_those_of_transformers(model: Any, reference: Any, rows: list[list[int]]) -> None:
    """Of batches of unequal length too; where a row has no token, its logits are zeros."""
    batch = padded(rows)
    wanted, found = reference(**batch).logits, model(**batch).logits
    ones = batch["attention_mask"].bool()
    assert found.shape == wanted.shape
    torch.testing.assert_close(found[ones], wanted[ones], atol=1e-3, rtol=0)
    assert not found[~ones].any()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    assert torch.equal(model.generate(**batch, **options), reference.generate(**batch, **options))


@pytest.mark.parametrize("model_type", ["gpt_oss"])
def test_sliding_windows(
    tiny_bundle: Callable[[str], Bundle], tiny_checkpoint: Callable[[str], Path], model_type: str
) -> None:
    """Texts longer than the window, in a batch with a short one."""
    batch = padded([[*range(2, 90)], [7, 8, 9]])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    wanted = reference_of(tiny_checkpoint(model_type)).generate(**batch, **options)
    with PocketMoEForCausalLM.from_pretrained(tiny_bundle(model_type).root, sequences=2) as loaded:
        assert torch.equal(loaded.generate(**batch, **options), wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
        {"do_sample": True, "top_k": 5, "num_return_sequences": 3},
        {"do_sample": True, "min_p": 0.05, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"do_sample": True, "typical_p": 0.8, "min_new_tokens": 6},
        {"do_sample": False, "repetition_penalty": 1.2, "bad_words_ids": [[5]], "suppress_tokens": [9]},
        {"do_sample": False, "use_cache": False},
        {"do_sample": True, "guidance_scale": 1.5},
    ],
    ids=str,
)
def test_sampling_with_a_seed(model: Any, reference: Any, tokenizer: Any, options: dict[str, Any]) -> None:
    """transformers chooses, so that a seed gives what it gives there."""
    batch = encoded(tokenizer, PROMPT)
    found: list[torch.Tensor] = []
    for each in (model, reference):
        torch.manual_seed(11)
        found.append(each.generate(**batch, max_new_tokens=10, pad_token_id=1, **options))
    assert torch.equal(*found)


class Until(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


class Only(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.arange(scores.shape[1]) == 7, 0.0, -torch.inf).expand_as(scores)


def test_streamers_stopping_criteria_and_processors(model: Any, tokenizer: Any) -> None:
    """A streamer in another thread gets the text; criteria end it; processors have the last word; strings stop it."""
    batch = encoded(tokenizer, PROMPT)
    width = batch["input_ids"].shape[1]
    whole = model.generate(**batch, max_new_tokens=12, do_sample=False, eos_token_id=None)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=HANG_S)
    asked = {**batch, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "streamer": streamer}
    thread = threading.Thread(target=model.generate, kwargs=asked)
    thread.start()
    assert "".join(streamer) == tokenizer.decode(whole[0, width:], skip_special_tokens=True)
    thread.join()
    stops = StoppingCriteriaList([Until(width + 4)])
    assert model.generate(**batch, max_new_tokens=12, stopping_criteria=stops).shape[1] == width + 4
    only = LogitsProcessorList([Only()])
    found = model.generate(**batch, max_new_tokens=3, logits_processor=only, do_sample=False)
    assert found[0, width:].tolist() == [7, 7, 7]
    piece = tokenizer.decode(whole[0, width : width + 2])
    found = model.generate(**batch, max_new_tokens=12, do_sample=False, stop_strings=[piece], tokenizer=tokenizer)
    assert width < found.shape[1] <= width + 2
    scored = model.generate(
        **batch, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_logits=True, output_scores=True
    )
    assert len(scored.logits) == len(scored.scores) == 2
    assert isinstance(scored.past_key_values, TextsCache)


def test_torch_computes_with_one_thread_meanwhile(model: Any) -> None:
    """Its helpers would spin on the engine's CPU; afterwards, and after an error, it has as many as it had."""
    seen: list[int] = []

    class Looks(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_num_threads())
            if len(seen) == 3:
                raise ArithmeticError
            return scores

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(ArithmeticError):
            model.generate(torch.tensor([[5]]), max_new_tokens=9, logits_processor=[Looks()], eos_token_id=None)
        assert (seen, torch.get_num_threads()) == ([1, 1, 1], 3)
    finally:
        torch.set_num_threads(before)


def test_a_cache_is_a_text(root: Path, model: Any) -> None:
    """Copied, cropped, handed over twice, and between others that take its place: the same bits as without them."""
    ids = torch.tensor([[*range(2, 140)]])

    def decoded(
        each: Any, cache: Any, tokens: list[int], meanwhile: Callable[[], object] | None = None
    ) -> torch.Tensor:
        rows: list[torch.Tensor] = []
        for token in tokens:
            rows.append(each(torch.tensor([[token]]), past_key_values=cache, logits_to_keep=1).logits)
            if meanwhile:
                meanwhile()
        return torch.cat(rows)

    with PocketMoEForCausalLM.from_pretrained(root) as alone:
        cache = alone(ids, logits_to_keep=1).past_key_values
        first, second = copy.deepcopy(cache), copy.deepcopy(cache)
        wanted = decoded(alone, first, [5, 6, 7, 8])
        assert cache.get_seq_length() == 138
        assert first.get_seq_length() == 142
        assert torch.equal(decoded(alone, second, [5, 6, 7, 8], lambda: alone(ids[:, :3])), wanted)
        first.crop(140)
        assert torch.equal(decoded(alone, first, [7, 8]), wanted[2:])
        first.crop(-1)
        assert first.get_seq_length() == 141
        assert torch.equal(decoded(alone, first, [8]), wanted[3:])
        assert torch.equal(decoded(alone, cache, [5, 6, 7, 8]), wanted)
        both = copy.deepcopy(second)
        both.batch_repeat_interleave(2)
        two = torch.tensor([[9], [9]])
        with pytest.raises(BadInput, match="a batch of 2 texts"):
            alone(two, past_key_values=both)
    rows = model(two, past_key_values=both, logits_to_keep=1).logits
    assert torch.equal(rows[0], rows[1])


def test_a_conversation_goes_on_from_its_cache(model: Any, tokenizer: Any) -> None:
    """`generate` with the cache of an earlier one gives what it gives from the whole text, batch and padding too."""
    batch = encoded(tokenizer, PROMPT * 3, PROMPT)
    first = model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    more = torch.cat([first.sequences, torch.tensor([[5, 6], [7, 8]])], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 8, dtype=torch.long)], dim=1)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    going_on = model.generate(more, past_key_values=first.past_key_values, **options)
    assert torch.equal(going_on, model.generate(more, **options))


def test_a_pipeline(model: Any, reference: Any, tokenizer: Any) -> None:
    """`text-generation`, alone, in batches, and for messages by the chat template, as with transformers' model."""
    options = {"max_new_tokens": 6, "do_sample": False}
    asked: list[Any] = [PROMPT, [PROMPT, "once upon", "a"], [{"role": "user", "content": "hello"}]]
    ours, theirs = (pipeline("text-generation", model=each, tokenizer=tokenizer) for each in (model, reference))
    for question in asked:
        assert ours(question, **options) == theirs(question, **options)
    assert ours(asked[1], batch_size=3, **options) == theirs(asked[1], batch_size=3, **options)


def test_how_the_authors_generate(model: Any, reference: Any) -> None:
    """Ends and defaults of generation_config.json are there."""
    for name in ("eos_token_id", "bos_token_id", "pad_token_id", "max_new_tokens", "do_sample"):
        found, wanted = (getattr(each.generation_config, name) for each in (model, reference))
        assert found == wanted or found == [wanted], name
    assert (model.config.vocab_size, model.device.type, model.dtype) == (
        reference.config.vocab_size,
        "cpu",
        torch.float32,
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 4}, "beams"),
        ({"num_beams": 4, "do_sample": True}, "beams"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "beams"),
        ({"prompt_lookup_num_tokens": 3}, "assisted"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive"),
        ({"dola_layers": "high"}, "DoLa"),
        ({"custom_generate": "someone/code"}, "run code from the hub"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"prefill_chunk_size": 16}, "prefill_chunk_size"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"num_return_sequences": 9, "do_sample": True}, "a batch of 9 texts"),
        ({"max_new_tokens": 5000}, "the context holds"),
        ({"past_key_values": Ellipsis}, "past_key_values"),
    ],
    ids=str,
)
def test_what_is_not_offered_is_refused_by_name(model: Any, options: dict[str, Any], words: str) -> None:
    """In one line, before anything is computed; and the model goes on to work."""
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(BadInput, match=words) as caught:
        model.generate(ids, **{"max_new_tokens": 4, "pad_token_id": 1, **options})
    assert "\n" not in caught.value.one_line()
    assert model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=1).shape == (1, 4)


def test_an_assistant_is_refused(model: Any, reference: Any) -> None:
    with pytest.raises(BadInput, match="assistant_model"):
        model.generate(torch.tensor([[5]]), assistant_model=reference)
    with pytest.raises(BadInput, match="generate_batch"):
        model.generate_batch([[5]])


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"input_ids": torch.tensor([5, 6])}, "not int64"),
        ({"input_ids": [[5, 6]]}, "not int64"),
        ({"input_ids": torch.tensor([[5.0]])}, "not int64"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "no token"),
        ({"input_ids": torch.tensor([[99999]])}, "token 99999"),
        ({"input_ids": torch.tensor([[-1]])}, "token -1"),
        (
            {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[1, 0]])},
            "Pad on the left|zeros after",
        ),
        ({"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.tensor([[1, 0, 1]])}, "zeros after"),
        ({"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[0, 0]])}, "without a token"),
        ({"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[1]])}, "one entry|attention_mask is"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 1, 8)}, "inputs_embeds"),
        ({"input_ids": torch.tensor([[5]]), "labels": torch.tensor([[5]])}, "labels"),
        ({"input_ids": torch.full((1, 5000), 5)}, "the context holds"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_wrong_inputs(model: Any, inputs: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        model(**inputs)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"device_map": "cuda"}, BadInput, "device_map"),
        ({"dtype": torch.float16}, BadInput, "dtype"),
        ({"subfolder": "x"}, BadInput, "subfolder"),
        ({"config": Ellipsis}, BadInput, "config"),
        ({"provider": "CUDAExecutionProvider"}, BadInput, "provider"),
        ({"speed": 3}, BadInput, "no option speed"),
        ({"scheme": "int4"}, BadInput, "is for checkpoints"),
        ({"export": True}, BadInput, "is a bundle already"),
        ({"revision": "main"}, BadInput, "no revisions"),
        ({"memory": "1MB"}, BudgetTooSmall, "cannot be met"),
        ({"memory": "much"}, BadInput, "much"),
        ({"sequences": 0}, BadInput, "sequences"),
        ({"backend": "gpu"}, BadInput, "backend"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_ways_to_load(root: Path, options: dict[str, Any], error: type[PocketMoEError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        PocketMoEForCausalLM.from_pretrained(root, **options)
    assert "\n" not in caught.value.one_line()


def test_what_is_no_bundle(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    for place in (tiny_checkpoint("olmoe"), tmp_path, "no/such/place"):
        with pytest.raises(BadInput, match="not a PocketMoE bundle"):
            PocketMoEForCausalLM.from_pretrained(place)


def test_memory_threads_and_a_prefix_cache(root: Path, tmp_path: Path, model: Any) -> None:
    """As of `pocketmoe.load`: the budget is kept, and what prompts compute is found by the next process."""
    prompt = torch.tensor([[*range(2, 150)]])
    wanted = model.generate(prompt, max_new_tokens=3, do_sample=False)
    options: dict[str, Any] = {"memory": "6GB", "threads": 1, "prefix_cache": tmp_path / "kept"}
    for again in (False, True):
        with PocketMoEForCausalLM.from_pretrained(root, **options) as loaded:
            assert loaded.model.memory["budget"] == 6 * 10**9
            assert loaded.model.threads == 1
            assert torch.equal(loaded.generate(prompt, max_new_tokens=3, do_sample=False), wanted)
            chosen = loaded.model.engine.stats.expert_counts.sum()
        assert any((tmp_path / "kept").iterdir())
        assert again or chosen > 2 * 148
    assert chosen < 2 * 148


def test_saved_and_pushed(root: Path, model: Any, tokenizer: Any, tmp_path: Path, hub: WritableHub) -> None:
    """A directory is the same bundle, which pipelines may put their tokenizer beside; the hub gives it back."""
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    pipe.save_pretrained(tmp_path / "saved")
    names = {*model.bundle.manifest.files, MANIFEST}
    saved, original = tree(tmp_path / "saved"), tree(root)
    assert {name: saved[name] for name in names} == {name: original[name] for name in names}
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").encode(PROMPT) == tokenizer.encode(PROMPT)
    model.save_pretrained(tmp_path / "again", push_to_hub=True, repository_id="me/saved", private=True)
    assert hub.repositories["me/saved"].private
    model.push_to_hub("me/loaded")
    hub.requests.clear()
    with PocketMoEForCausalLM.from_pretrained("me/saved", cache_dir=tmp_path / "cache") as loaded:
        assert loaded.bundle.root.is_relative_to(tmp_path / "cache")
        ids = torch.tensor([[5, 6, 7]])
        assert torch.equal(*(each.generate(ids, max_new_tokens=4, do_sample=False) for each in (loaded, model)))
    with pytest.raises(BadInput, match="no place on the hub"):
        model.push_to_hub("saved")
    with pytest.raises(BadInput, match="no option token"):
        model.save_pretrained(tmp_path / "again", token="x")


def test_a_checkpoint_is_exported_first(tiny_checkpoint: Callable[[str], Path], tmp_path: Path, model: Any) -> None:
    """With a scheme; into a place of its own, or one that goes with the model; an error leaves nothing."""
    checkpoint = tiny_checkpoint("olmoe")
    with PocketMoEForCausalLM.from_pretrained(str(checkpoint), export=True, scheme="int8") as loaded:
        root = loaded.bundle.root
        assert loaded.bundle.manifest.expert_kinds[0].scheme.startswith("int8")
        assert loaded.generate(torch.tensor([[5, 6]]), max_new_tokens=3).shape[1] > 2
    assert not root.exists()
    loaded.close()
    with pytest.raises(PocketMoEError, match="nowhere"):
        PocketMoEForCausalLM.from_pretrained("nowhere", export=True, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
