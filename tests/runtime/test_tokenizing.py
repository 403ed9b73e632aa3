"""A bundle's tokenizer: what a text becomes, and what a hostile file or text cannot do."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pocketmoe.bundle.manifest import TokenizerCheck
from pocketmoe.errors import BadInput, DamagedFile
from pocketmoe.isolated import isolated
from pocketmoe.profiles.calibration.calibrate import text_windows
from pocketmoe.profiles.quality.quality import Slice, tokenize
from pocketmoe.runtime import tokenizer as runtime_text
from pocketmoe.runtime.backends.packing import packed_folder
from pocketmoe.runtime.tokenizer import TOKENIZER, Text

VOCABULARY = {"<s>": 0, "a": 1, "b": 2, "ab": 3, "<far>": 9}


def written(**changes: Any) -> dict[str, Any]:
    """A tokenizer.json that knows a, b and ab, and the special tokens <s> and <far>; changes are to its parts."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model = {"type": "BPE", "unk_token": None, "vocab": VOCABULARY, "merges": [["a", "b"]]}
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 0, "content": "<s>", **flags}, {"id": 9, "content": "<far>", **flags}],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": model,
    }
    return {**whole, **changes, "model": {**model, **changes.get("model", {})}}


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[..., Any]:
    """bundle(tokenizer.json, check): what `Text` needs of a bundle, whose model has embeddings of 9 tokens."""

    def make(contents: Any, check: TokenizerCheck | None = None) -> Any:
        path = tmp_path / "tokenizer.json"
        path.write_bytes(contents if isinstance(contents, bytes) else json.dumps(contents).encode())
        model = SimpleNamespace(vocab_size=9, context_length=64)
        entry = SimpleNamespace(sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        manifest = SimpleNamespace(model=model, tokenizer=check, files={TOKENIZER: entry}, store_index_sha256="0")
        return SimpleNamespace(
            root=tmp_path, manifest=manifest, packed_place=None, check_file=lambda name: {TOKENIZER: path}[name]
        )

    return make


def test_truncation_and_padding_of_older_bundles(bundle: Callable[..., Any]) -> None:
    """Earlier exports left both in the file; a prompt is whole all the same."""
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 5}
    filled = {
        "strategy": {"Fixed": 2**40},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "a",
    }
    assert Text(bundle(written(truncation=cut, padding=filled))).encode("abba") == [3, 2, 1]


def test_special_tokens_in_a_text(bundle: Callable[..., Any]) -> None:
    """They are ids, unless the manifest says that the checkpoint's tokenizer splits them."""
    split = TokenizerCheck(strings=1, sha256="", made_by="X", split_special_tokens=True)
    assert Text(bundle(written())).encode("a<s>b") == [1, 0, 2]
    assert Text(bundle(written(), split)).encode("a<s>b") == [3]  # < and > are unknown


def test_special_tokens_that_are_added(bundle: Callable[..., Any]) -> None:
    """A text gets those of the post-processor, unless it has its own."""
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    text = Text(bundle(written(post_processor=template)))
    assert text.encode("ab") == [0, 3]
    assert text.encode("ab", add_special_tokens=False) == [3]


BEYOND = "'<far>', token 9, but the model knows only those below 9"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("a\udcffb", "not UTF-8"),
        ("\ud83d", "not UTF-8"),
        ("", "no tokens"),
        ("xyz", "no tokens"),
        ("ab<far>", BEYOND),
    ],
)
def test_texts_that_no_model_can_read(bundle: Callable[..., Any], given: str, said: str) -> None:
    """Bytes that are not UTF-8, nothing that is known, tokens without embedding: one error each."""
    with pytest.raises(BadInput, match=said):
        Text(bundle(written())).encode(given)


def test_ids_are_held_against_the_embedding_wherever_text_comes_in(bundle: Callable[..., Any]) -> None:
    """Calibration and eval refuse what run refuses."""
    slices = [Slice("one", "abab<far>")]
    with pytest.raises(BadInput, match=BEYOND):
        text_windows(bundle(written()), slices, 100)
    with pytest.raises(BadInput, match=BEYOND):
        tokenize([bundle(written())], slices, None)


def test_a_word_that_is_unknown(bundle: Callable[..., Any]) -> None:
    """Where the tokenizer has no token for it, the text is refused, not the program ended."""
    with pytest.raises(BadInput, match=r"cannot take the text \(Unk token `\?` not found in the vocabulary\)"):
        Text(bundle(written(model={"unk_token": "?"}))).encode("z")


LOADING = {
    "not JSON": b"{",
    "not UTF-8": b"\xff\xfe",
    "nested deep": b"[" * 100_000,
    "another type": [],
    "a charsmap that is none": written(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "a prefix longer than words": written(model={"continuing_subword_prefix": "x" * 9}),
}


@pytest.mark.parametrize("name", LOADING)
def test_files_that_cannot_be_loaded(name: str, bundle: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    """Errors and panics of the parser are one error that names the file; nothing is printed."""
    with pytest.raises(DamagedFile, match=r"tokenizer.json: cannot be read \("):
        Text(bundle(LOADING[name]))
    assert capfd.readouterr() == ("", "")


def bomb(content: str) -> dict[str, Any]:
    """Each of 30 steps makes two of one."""
    step = {"type": "Replace", "pattern": {"String": content}, "content": content * 2}
    return {"type": "Sequence", "normalizers": [step] * 30}


SPLIT = {"type": "Split", "pattern": {"Regex": "([ab]+)+$"}, "behavior": "Isolated", "invert": False}
UNKNOWN = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "q", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {},
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"normalizer": bomb("a")}, "needs more than 64 MiB|MemoryError|processor time"),
        ({"pre_tokenizer": SPLIT}, "retry-limit-in-match over"),
        ({"post_processor": UNKNOWN}, "no entry found for key"),
    ],
)
def test_files_that_cannot_encode(
    changes: dict[str, Any],
    said: str,
    bundle: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A panic, an allocation that fails, a pattern without end: one error, and the process lives."""
    monkeypatch.setattr(runtime_text, "LEAST_MEMORY_BYTES", 64 << 20)
    text = Text(bundle(written(**changes)))
    with pytest.raises(BadInput, match=said):
        text.encode("ab" * 40 + "c")
    assert text.decode([1, 2]) == "ab"
    assert capfd.readouterr() == ("", "")


def test_a_decoder_that_fills_the_memory(bundle: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Found while loading, since answers are decoded without a child."""
    monkeypatch.setattr(runtime_text, "LEAST_MEMORY_BYTES", 64 << 20)
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    with pytest.raises(DamagedFile, match="cannot be read"):
        Text(bundle(written(decoder={"type": "Sequence", "decoders": [{"type": "Fuse"}, *[step] * 30]})))


def children(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]) -> int:
    """How many children are made by a call."""
    made = []
    with monkeypatch.context() as patch:
        patch.setattr(runtime_text, "isolated", lambda work, limits: made.append(limits) or isolated(work, limits))
        make()
    return len(made)


def test_loading_is_rehearsed_once(bundle: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once experts are packed there is a place to remember it, for these bytes of the file alone."""
    first = bundle(written())
    assert [children(monkeypatch, lambda: Text(first)) for _ in range(2)] == [1, 1]
    packed_folder(first).mkdir(parents=True)
    assert [children(monkeypatch, lambda: Text(first)) for _ in range(3)] == [1, 0, 0]
    other = bundle(written(decoder=None))
    assert [children(monkeypatch, lambda: Text(other)) for _ in range(2)] == [1, 0]
    assert packed_folder(first).joinpath("tokenizer").stat().st_mode & 0o777 == 0o600


def test_what_lies_in_packed_is_not_followed(bundle: Callable[..., Any], tmp_path: Path) -> None:
    """A link in the place of the folder or of the line is not written through; a pipe does not block."""
    made = bundle(written())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder = packed_folder(made)
    folder.parent.symlink_to(elsewhere)
    (elsewhere / folder.name).mkdir()
    Text(made)
    assert not list((elsewhere / folder.name).iterdir())
    folder.parent.unlink()
    folder.mkdir(parents=True)
    (folder / "tokenizer").symlink_to(elsewhere / "written")
    Text(made)
    assert not (elsewhere / "written").exists()
    (folder / "tokenizer").unlink()
    os.mkfifo(folder / "tokenizer")
    assert Text(made).encode("ab") == [3]
