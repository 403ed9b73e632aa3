"""generation_config.json: the ends of text and the sampling that transformers' generate would use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pocketmoe.bundle.manifest import Sampling
from pocketmoe.errors import BadInput
from pocketmoe.export.text import generation


def write(root: Path, settings: Any) -> None:
    text = settings if isinstance(settings, str | bytes) else json.dumps(settings)
    (root / generation.FILE).write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense model, which transformers loads in no time."""
    from tests import tiny

    root = tmp_path_factory.mktemp("model")
    tiny.make_model("llama").save_pretrained(root)
    return root


ABSENT = "absent"
CASES: list[tuple[Any, Any]] = [
    (1, ABSENT),
    ([1, 2], ABSENT),
    (None, ABSENT),
    (1, {"eos_token_id": [1, 5]}),
    (5, {"eos_token_id": 1}),
    (1, {"eos_token_id": None}),
    (1, {}),
    (1, {"eos_token_id": [7, 7, 3]}),
    (1, "{no json"),
    ([4], b"\xff\xfe"),
]


@pytest.mark.parametrize(("config_eos", "settings"), CASES)
def test_texts_end_where_those_of_transformers_end(model: Path, config_eos: Any, settings: Any) -> None:
    """The ids at which `generate` stops, for each of the places where they may stand."""
    from transformers import AutoModelForCausalLM

    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "eos_token_id": config_eos}))
    (model / generation.FILE).unlink(missing_ok=True)
    if settings != ABSENT:
        write(model, settings)
    theirs = AutoModelForCausalLM.from_pretrained(model).generation_config.eos_token_id
    wanted = theirs if isinstance(theirs, list) else [] if theirs is None else [theirs]
    assert generation.read(model, config_eos).eos_token_ids == tuple(dict.fromkeys(wanted))


@pytest.mark.parametrize(
    "settings",
    [[], 5, "[" * 100_000, {"eos_token_id": "x"}, {"eos_token_id": True}, {"eos_token_id": 1.5},
     {"eos_token_id": [[1]]}, {"eos_token_id": {"a": 1}}, '{"a": ' + "[" * 100_000, " " * (5 << 20)],
    ids=lambda settings: str(settings)[:30],
)  # fmt: skip
def test_what_transformers_cannot_use_is_one_line(tmp_path: Path, settings: Any) -> None:
    """Wrong types, nesting and size name the file."""
    write(tmp_path, settings)
    with pytest.raises(BadInput, match=r"generation_config\.json") as refused:
        generation.read(tmp_path, 1)
    assert len(refused.value.one_line()) < 400


def test_the_authors_sampling_is_kept(tmp_path: Path) -> None:
    """What the file says, as it says it; what makes no sense is left out and said."""
    write(tmp_path, {"eos_token_id": 1, "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0})
    found = generation.read(tmp_path, 1)
    assert found.sampling == Sampling(do_sample=True, temperature=0.6, top_k=20, top_p=0.95, min_p=0.0)
    assert found.notes == ()
    write(tmp_path, {"eos_token_id": 1, "transformers_version": "4.51.0", "temperature": None})
    assert generation.read(tmp_path, 1).sampling is None
    write(tmp_path, '{"temperature": NaN, "top_p": 7, "top_k": "many", "max_new_tokens": -1, "min_p": 0.1}')
    found = generation.read(tmp_path, 1)
    assert found.sampling == Sampling(min_p=0.1)
    assert all(name in " ".join(found.notes) for name in ("temperature", "top_p", "top_k", "max_new_tokens"))
    assert "no end of text" in " ".join(found.notes)
