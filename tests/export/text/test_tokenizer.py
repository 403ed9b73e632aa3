"""A bundle's tokenizer gives the ids and the text of transformers' own, whatever the checkpoint's files say."""

# pyright: reportArgumentType=false, reportAssignmentType=false

from __future__ import annotations

import base64
import json
import random
import shutil
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from pocketmoe.errors import BadInput, OutputError
from pocketmoe.export.checkpoint.checkpoint import Checkpoint
from pocketmoe.export.text import tokenizer
from pocketmoe.isolated import Limits
from pocketmoe.runtime.tokenizer import TOKENIZER, Text

TEXT = (
    "The miller kept a ledger of every sack that crossed the bridge, and on market days he read it aloud to anyone "
    "who would listen. Nobody did, except the heron, who liked the sound of numbers and the crumbs from his bread. "
)
SPECIAL = ["<s>", "</s>", "<unk>"]
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def byte_bpe(**changes: Any) -> Tokenizer:
    """A byte-level BPE; 0 is <s>, 1 is </s>, 2 is <unk>."""
    made = Tokenizer(models.BPE(**changes))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return made


def with_bos(made: Tokenizer) -> Tokenizer:
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return made


def byte_fallback(*, prepend: bool) -> Tokenizer:
    """A BPE as Llama 2's: spaces as U+2581, bytes where a character is unknown."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    words = [*["<unk>", "<s>", "</s>"], *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [word for word in model["vocab"] if word not in words]
    merges = [tuple(merge) for merge in model["merges"]]
    vocab = {word: index for index, word in enumerate(words)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    if prepend:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def unigram(normalizer: Any = None) -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    made.train_from_iterator([TEXT], trainer)
    return made


def wordpiece() -> Tokenizer:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(
        [TEXT], trainers.WordPieceTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    )
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made


def word_level() -> Tokenizer:
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator([TEXT + " do n't , ."], trainers.WordLevelTrainer(special_tokens=SPECIAL))
    return made


def flagged() -> Tokenizer:
    made = byte_bpe()
    made.normalizer = normalizers.Lowercase()
    made.add_tokens(
        [
            AddedToken("<left>", lstrip=True),
            AddedToken("<right>", rstrip=True),
            AddedToken("WORD", single_word=True),
            AddedToken("Normal", normalized=True),
            AddedToken("Exact", normalized=False),
        ]
    )
    made.add_special_tokens([AddedToken("<Both>", lstrip=True, rstrip=True, normalized=False)])
    return made


Files = dict[str, Any]  # name -> content: JSON, text, bytes, or what makes a file of that path


def files(made: Tokenizer | None, *, changes: Files | None = None, others: Files | None = None, **config: Any) -> Files:
    """A checkpoint's files. `changes`: to tokenizer.json; `config`: tokenizer_config.json."""
    written: Files = {} if made is None else {"tokenizer.json": json.loads(made.to_str()) | (changes or {})}
    return {**written, "tokenizer_config.json": config, **(others or {})}


def sentencepiece(kind: str) -> Callable[[Path], None]:
    def train(path: Path) -> None:
        import sentencepiece

        sentencepiece.set_min_log_level(3)
        with open(path, "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter([TEXT] * 8),
                model_writer=file,
                vocab_size=400 if kind == "bpe" else 320,
                model_type=kind,
                byte_fallback=True,
                hard_vocab_limit=False,
                num_threads=1,
            )

    return train


def tiktoken_file() -> bytes:
    words = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the", b"re", b"\xc3\xa9", b"  "]
    return b"\n".join(base64.b64encode(word) + b" %d" % rank for rank, word in enumerate(words))


def tekken() -> Files:
    words = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the", b"re"]
    special = [
        {"rank": i, "token_str": t, "is_control": True} for i, t in enumerate(["<unk>", "<s>", "</s>", "[INST]"])
    ]
    return {
        "config": {
            "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            "num_vocab_tokens": len(words),
            "default_vocab_size": len(words) + len(special),
            "default_num_special_tokens": len(special),
            "version": "v3",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": word.decode("utf-8", "replace")}
            for rank, word in enumerate(words)
        ],
        "special_tokens": special,
    }


def token(content: str, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": content, **plain, **flags}


def gpt2_files() -> Files:
    model = json.loads(byte_bpe().to_str())["model"]
    merges = "#version: 0.2\n" + "\n".join(" ".join(merge) for merge in model["merges"])
    return {"vocab.json": model["vocab"], "merges.txt": merges}


FAST = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED}
LLAMA = {"tokenizer_class": "LlamaTokenizer", **NAMED}
TRUNCATION = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}


def padding(direction: str, multiple: int | None = None) -> Files:
    fixed: Any = {"Fixed": 64} if multiple is None else "BatchLongest"
    rest = {"pad_to_multiple_of": multiple, "pad_id": 1, "pad_type_id": 0, "pad_token": "</s>"}
    return {"strategy": fixed, "direction": direction, **rest}


VARIATIONS: dict[str, tuple[str, Callable[[], Files]]] = {
    "byte-level": ("olmoe", lambda: files(byte_bpe(), **FAST)),
    "no tokenizer_config": ("olmoe", lambda: {"tokenizer.json": json.loads(byte_bpe().to_str())}),
    "bos and eos by post-processor": ("olmoe", lambda: files(with_bos(byte_bpe()), **FAST)),
    "add_bos_token": ("olmoe", lambda: files(byte_bpe(), **FAST, add_bos_token=True)),
    "add_bos_token against the post-processor": (
        "olmoe",
        lambda: files(with_bos(byte_bpe()), **FAST, add_bos_token=False),
    ),
    "byte-level Llama, add_bos_token": ("olmoe", lambda: files(byte_bpe(), **LLAMA, add_bos_token=True)),
    "byte-level Llama, Mixtral": ("mixtral", lambda: files(byte_bpe(), **LLAMA, add_eos_token=True)),
    "truncation": ("olmoe", lambda: files(byte_bpe(), changes={"truncation": TRUNCATION}, **FAST)),
    "padding left": ("olmoe", lambda: files(byte_bpe(), changes={"padding": padding("Left")}, **FAST)),
    "padding right": ("olmoe", lambda: files(with_bos(byte_bpe()), changes={"padding": padding("Right", 16)}, **FAST)),
    "both": (
        "olmoe",
        lambda: files(byte_bpe(), changes={"truncation": TRUNCATION, "padding": padding("Left")}, **FAST),
    ),
    "model_max_length": ("olmoe", lambda: files(byte_bpe(), **FAST, model_max_length=8, truncation_side="left")),
    "added_tokens_decoder": (
        "olmoe",
        lambda: files(
            byte_bpe(),
            **FAST,
            added_tokens_decoder={
                "330": token("<|im_start|>"),
                "331": token("<tool>", special=False, normalized=True),
                "332": token("<pad>", lstrip=True, rstrip=True),
            },
        ),
    ),
    "added_tokens.json": (
        "olmoe",
        lambda: files(byte_bpe(), **FAST, others={"added_tokens.json": {"<a>": 330, "<b c>": 331}}),
    ),
    "special_tokens_map.json": (
        "olmoe",
        lambda: files(
            byte_bpe(),
            tokenizer_class="PreTrainedTokenizerFast",
            others={
                "special_tokens_map.json": {
                    "bos_token": token("<s>"),
                    "pad_token": token("<filler>", lstrip=True),
                    "additional_special_tokens": ["<x>", "<y>"],
                    "eos_token": "</s>",
                }
            },
        ),
    ),
    "additional_special_tokens": (
        "olmoe",
        lambda: files(byte_bpe(), **FAST, additional_special_tokens=["<think>", "</think>"]),
    ),
    "extra_special_tokens by name": (
        "olmoe",
        lambda: files(byte_bpe(), **FAST, extra_special_tokens={"image_token": "<image>"}, audio_token="<audio>"),
    ),
    "special tokens as dictionaries": (
        "olmoe",
        lambda: files(
            byte_bpe(),
            tokenizer_class="PreTrainedTokenizerFast",
            bos_token={"__type": "AddedToken", **token("<s>")},
            eos_token={"__type": "AddedToken", **token("<end>", rstrip=True)},
            unk_token=None,
        ),
    ),
    "flags of added tokens": ("olmoe", lambda: files(flagged(), **FAST)),
    "split_special_tokens": ("olmoe", lambda: files(with_bos(byte_bpe()), **FAST, split_special_tokens=True)),
    "clean-up asked of a BPE": ("olmoe", lambda: files(byte_bpe(), **FAST, clean_up_tokenization_spaces=True)),
    "ByteLevel with a space in front": (
        "olmoe",
        lambda: files(byte_bpe(), **NAMED, tokenizer_class="GPT2Tokenizer", add_prefix_space=True),
    ),
    "Qwen2": ("qwen3_moe", lambda: files(byte_bpe(), tokenizer_class="Qwen2Tokenizer", eos_token="</s>")),
    "unigram": ("olmoe", lambda: files(unigram(), **FAST)),
    "unigram, normalized": (
        "olmoe",
        lambda: files(
            unigram(normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])),
            **FAST,
            clean_up_tokenization_spaces=True,
        ),
    ),
    "byte fallback, legacy": ("mixtral", lambda: files(byte_fallback(prepend=True), **LLAMA, legacy=True)),
    "byte fallback, not legacy": ("mixtral", lambda: files(byte_fallback(prepend=False), **LLAMA, legacy=False)),
    "byte fallback, plain class": ("olmoe", lambda: files(byte_fallback(prepend=True), **FAST)),
    "byte fallback, Llama and bos": (
        "olmoe",
        lambda: files(byte_fallback(prepend=True), **LLAMA, add_bos_token=False, add_eos_token=True),
    ),
    "byte fallback, Llama, no space in front": (
        "olmoe",
        lambda: files(byte_fallback(prepend=True), **LLAMA, add_prefix_space=False),
    ),
    "WordPiece": (
        "olmoe",
        lambda: files(wordpiece(), tokenizer_class="PreTrainedTokenizerFast", unk_token="[UNK]", cls_token="[CLS]"),
    ),
    "WordPiece, BERT's class": (
        "olmoe",
        lambda: files(wordpiece(), tokenizer_class="BertTokenizer", clean_up_tokenization_spaces=True),
    ),
    "words, cleaned up": ("olmoe", lambda: files(word_level(), **FAST, clean_up_tokenization_spaces=True)),
    "vocab.json and merges.txt": (
        "olmoe",
        lambda: files(None, tokenizer_class="GPT2Tokenizer", **NAMED, others=gpt2_files()),
    ),
    "sentencepiece alone, BPE": (
        "olmoe",
        lambda: files(None, **LLAMA, add_bos_token=True, others={"tokenizer.model": sentencepiece("bpe")}),
    ),
    "sentencepiece alone, Mixtral": ("mixtral", lambda: files(None, others={"tokenizer.model": sentencepiece("bpe")})),
    "sentencepiece alone, unigram": (
        "olmoe",
        lambda: files(None, tokenizer_class="T5Tokenizer", others={"spiece.model": sentencepiece("unigram")}),
    ),
    "sentencepiece and added_tokens.json": (
        "olmoe",
        lambda: files(
            None,
            **LLAMA,
            others={"tokenizer.model": sentencepiece("bpe"), "added_tokens.json": {"<|user|>": 400, "<x>": 401}},
        ),
    ),
    "tiktoken alone": ("olmoe", lambda: files(None, tokenizer_class="T", others={"tiktoken.model": tiktoken_file()})),
    "tiktoken alone, added tokens": (
        "olmoe",
        lambda: files(
            None,
            tokenizer_class="T",
            added_tokens_decoder={"262": token("[BOS]"), "264": token("<|im_end|>")},
            bos_token="[BOS]",
            others={"tokenizer.model": tiktoken_file()},
        ),
    ),
    "tekken.json alone": ("mixtral", lambda: files(None, others={"tekken.json": tekken()})),
}


@cache
def shard() -> bytes:
    import torch
    from safetensors.torch import save

    return save({"lm_head.weight": torch.zeros(2, 2)})


def checkpoint(root: Path, model_type: str, contents: Files) -> Path:
    root.mkdir()
    config = {"model_type": model_type, "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2}
    (root / "config.json").write_text(json.dumps({**config, "bos_token_id": 0, "eos_token_id": 1}))
    (root / "model.safetensors").write_bytes(shard())
    for name, content in contents.items():
        if callable(content):
            content(root / name)
        elif isinstance(content, str | bytes):
            (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
        else:
            (root / name).write_text(json.dumps(content), encoding="utf-8")
    return root


def convert(source: Path, vocab_size: int = 1 << 20, *, trusted: bool = False) -> Text:
    """What a bundle's `Text` would be."""
    target = source.with_name("bundle")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checked = tokenizer.write(Checkpoint(source, trusted), target)
    assert [path.name for path in target.iterdir()] == ["tokenizer"]
    model = SimpleNamespace(vocab_size=vocab_size)
    manifest = SimpleNamespace(model=model, tokenizer=checked, files={}, store_index_sha256="")
    bundle: Any = SimpleNamespace(
        root=target, manifest=manifest, packed_place=None, check_file=lambda name: target / name
    )
    return Text(bundle)


def texts(added: list[str]) -> list[str]:
    """Other strings than those that the export itself tries."""
    chance = random.Random(5)
    ranges = [
        (32, 126),
        (32, 126),
        (97, 122),
        (160, 591),
        (0x300, 0x36F),
        (0x4E00, 0x4FFF),
        (0x1F600, 0x1F64F),
        (0, 40),
    ]
    drawn = [
        "".join(chr(chance.randint(*chance.choice(ranges))) for _ in range(chance.randint(1, 20))) for _ in range(120)
    ]
    words = TEXT.split()
    drawn += [
        " ".join(chance.choices(words, k=12)) + chance.choice([".", "  ", "\n", " n't, don't ."]) for _ in range(20)
    ]
    for one in added:
        drawn += [one, f"{one} {one}{one}", f"a{one}b", f"x  {one}  y", f"{one}\n{chance.choice(words)}"]
    return drawn


@pytest.mark.parametrize("name", VARIATIONS)
def test_ids_and_text_are_those_of_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every text has the ids that AutoTokenizer gives it, and every sequence of ids its text."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # else transformers' tiktoken leaves a copy among temporary files
    from transformers import AutoTokenizer

    model_type, make = VARIATIONS[name]
    source = checkpoint(tmp_path / "checkpoint", model_type, make())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoTokenizer.from_pretrained(source, local_files_only=True)
        ours = convert(source)
        written = Tokenizer.from_file(str(tmp_path / "bundle" / TOKENIZER))
        written.encode_special_tokens = theirs.split_special_tokens
        added = [str(token) for token in theirs.added_tokens_decoder.values()]
        for text in texts(added):
            expected = list(theirs(text)["input_ids"])
            assert written.encode(text).ids == expected, text
            assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True), text
        assert ours.encode(TEXT) == theirs(TEXT)["input_ids"]
        assert len(ours.encode(TEXT)) not in (8, 64)
        chance = random.Random(6)
        for _ in range(60):
            ids = [chance.randrange(len(theirs)) for _ in range(8)]
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), ids
        again = AutoTokenizer.from_pretrained(tmp_path / "bundle" / "tokenizer", local_files_only=True)
        assert again(TEXT + "".join(added))["input_ids"] == theirs(TEXT + "".join(added))["input_ids"]
        assert again.special_tokens_map == theirs.special_tokens_map


def test_dropout_is_for_training(tmp_path: Path) -> None:
    """A BPE that skips merges at random, which transformers would do at each call, does not once it is in a bundle."""
    made = files(byte_bpe(), **FAST)
    plain = convert(checkpoint(tmp_path / "plain", "olmoe", made)).encode(TEXT)
    made["tokenizer.json"]["model"]["dropout"] = 0.5
    random_text = convert(checkpoint(tmp_path / "random", "olmoe", made))
    assert [random_text.encode(TEXT) for _ in range(3)] == [plain] * 3


def test_the_check_is_recorded(tmp_path: Path) -> None:
    """The manifest says how many strings were compared, by which versions, and the same tokenizer is the same check."""
    source = checkpoint(tmp_path / "checkpoint", "olmoe", files(byte_bpe(), **FAST))
    checks = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        checks.append(tokenizer.write(Checkpoint(source), tmp_path / name))
    assert checks[0] == checks[1]
    assert checks[0].strings > 300
    assert checks[0].made_by == "TokenizersBackend"
    assert set(checks[0].versions) == {"tokenizers", "transformers"}


def model(**changes: Any) -> Callable[[Files], None]:
    return lambda written: written["tokenizer.json"]["model"].update(changes)


def settings(**changes: Any) -> Callable[[Files], None]:
    return lambda written: written["tokenizer_config.json"].update(changes)


def part(**changes: Any) -> Callable[[Files], None]:
    return lambda written: written["tokenizer.json"].update(changes)


def replaced(name: str, content: Any) -> Callable[[Files], None]:
    return lambda written: written.update({name: content})


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 1\n"
UNKNOWN = {"single": [{"SpecialToken": {"id": "q", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}]}
DOUBLING = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee" * 16}

HOSTILE: dict[str, tuple[Callable[[Files], None], str]] = {
    "not JSON": (replaced("tokenizer.json", "{"), "cannot load"),
    "not UTF-8": (replaced("tokenizer_config.json", b"\xff\xfe{"), "it is not UTF-8"),
    "nested deep": (replaced("tokenizer_config.json", "[" * 100_000), "nested too deep"),
    "nested deep in added_tokens.json": (replaced("added_tokens.json", "[" * 100_000), "cannot load"),
    "a list for a table": (replaced("tokenizer_config.json", "[1]"), "no JSON object, but list"),
    "a number for a token": (settings(bos_token=5), "cannot load"),
    "a list for a template": (settings(chat_template=[5]), "cannot load"),
    "a lone surrogate": (settings(pad_token="\udc80"), "cannot load"),
    "an added token of a wrong type": (settings(added_tokens_decoder={"1": 5}), "cannot load"),
    "a charsmap that is none": (
        part(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "Cannot parse precompiled_charsmap",
    ),
    "a pattern that backtracks": (
        part(
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": "([a-z ]+)+$"},
                "behavior": "Isolated",
                "invert": False,
            }
        ),
        "retry-limit-in-match over",
    ),
    "a token that is not there": (
        part(post_processor={"type": "TemplateProcessing", **UNKNOWN, "special_tokens": {}}),
        "no entry found for key",
    ),
    "a prefix longer than the words": (model(continuing_subword_prefix="x" * 9), "cannot load"),
    "no unknown token": (model(unk_token="?", vocab={"a": 0}, merges=[]), "not found in the vocabulary"),
    "a normalizer that fills the memory": (
        part(normalizer={"type": "Sequence", "normalizers": [DOUBLING] * 12}),
        "needs more than 512 MiB",
    ),
    "Git LFS pointer": (replaced("tokenizer.json", POINTER), "Git LFS pointer"),
    "Git LFS pointer of a vocabulary": (replaced("tokenizer.model", POINTER), "Git LFS pointer"),
    "a vocabulary that is none": (
        lambda written: [written.pop("tokenizer.json"), written.update({"tokenizer.model": b"no model"})],
        "cannot load",
    ),
    "no tokenizer": (lambda written: written.pop("tokenizer.json"), "has no tokenizer.json"),
    "code that is not run": (
        lambda written: [
            written.pop("tokenizer.json"),
            written.update({"tiktoken.model": tiktoken_file()}),
            settings(tokenizer_class="Own", auto_map={"AutoTokenizer": ["tokenization_own.Own", None]})(written),
        ],
        "its tiktoken.model is read by code that comes with it (tokenization_own.Own)",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_used_is_refused_in_one_line(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a tokenizer's files hold: one error that names the checkpoint and the cause, and nothing printed."""
    monkeypatch.setattr(tokenizer, "LIMITS", Limits(memory_bytes=512 << 20, cpu_s=60, wall_s=600))
    change, said = HOSTILE[name]
    contents = files(byte_bpe(), **FAST)
    change(contents)
    source = checkpoint(tmp_path / "checkpoint", "olmoe", contents)
    with pytest.raises(BadInput) as caught:
        convert(source)
    assert said in str(caught.value)
    assert str(source) in str(caught.value)
    assert caught.value.remedy
    assert capfd.readouterr() == ("", "")


def test_a_difference_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one tokenizer.json does not give transformers' ids, the export names the text, both answers, the class."""
    from transformers import PreTrainedTokenizerFast

    call = PreTrainedTokenizerFast.__call__

    def shouting(self: Any, text: str, *rest: Any, **named: Any) -> Any:
        return call(self, text.upper(), *rest, **named)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", shouting)
    source = checkpoint(tmp_path / "checkpoint", "olmoe", files(byte_bpe(), **FAST))
    with pytest.raises(BadInput, match=r"\(TokenizersBackend\): .*differ from transformers, for 'Once upon a time'"):
        convert(source)


def test_settings_that_name_files_are_not_followed(tmp_path: Path) -> None:
    """A vocabulary elsewhere on the machine does not get into a bundle, whether by a setting or by a link."""
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps({"secret": 0}))
    contents = files(None, tokenizer_class="GPT2Tokenizer", vocab=str(secret), vocab_file=str(secret), **NAMED)
    source = checkpoint(tmp_path / "checkpoint", "olmoe", contents | {"vocab.json": {"a": 0}, "merges.txt": ""})
    convert(source)
    assert "secret" not in (tmp_path / "bundle" / TOKENIZER).read_text()
    (source / "vocab.json").unlink()
    (source / "vocab.json").symlink_to(secret)
    with pytest.raises(BadInput, match="outside of the checkpoint"):
        convert(source)


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever writing fails, the error is one that a user can read."""
    source = checkpoint(tmp_path / "checkpoint", "olmoe", files(byte_bpe(), **FAST))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for place in ((Path, "write_text"), (shutil, "copyfile")):
        with monkeypatch.context() as patch:
            patch.setattr(*place, full)
            with pytest.raises(OutputError, match="No space left"):
                convert(source)


OWN_CODE = r"""
import base64

import tiktoken
from tokenizers import AddedToken
from transformers import PreTrainedTokenizer


class Own(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tiktoken.model"}
    pat_str = r" ?[a-z]{1,3}|\p{N}|\s+|."

    def __init__(self, vocab_file, **settings):
        lines = [line.split() for line in open(vocab_file, "rb")]
        self.vocab_file, self.ranks = vocab_file, {base64.b64decode(word): int(rank) for word, rank in lines}
        self.known = {"[BOS]": len(lines), "[EOS]": len(lines) + 1}
        self.model = tiktoken.Encoding(
            "own", pat_str=self.pat_str, mergeable_ranks=self.ranks, special_tokens=self.known
        )
        added = {rank: AddedToken(token, special=True, normalized=False) for token, rank in self.known.items()}
        super().__init__(**{**settings, "added_tokens_decoder": added})

    @property
    def vocab_size(self):
        return len(self.ranks) + len(self.known)

    def get_vocab(self):
        return dict(self.known)

    def __call__(self, text):
        return {"input_ids": self.model.encode(text, allowed_special="all")}

    def decode(self, ids, skip_special_tokens=False):
        return self.model.decode([i for i in ids if not (skip_special_tokens and i in self.known.values())])
"""


def own_code(code: str) -> Files:
    named = {"AutoTokenizer": ["tokenization_own.Own", None]}
    config = {"tokenizer_class": "Own", "bos_token": "[BOS]", "eos_token": "[EOS]", "auto_map": named}
    return {"tiktoken.model": tiktoken_file(), "tokenization_own.py": code, "tokenizer_config.json": config}


def test_code_that_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --trust-remote-code, a class of the checkpoint's own around tiktoken is written down and compared."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    source = checkpoint(tmp_path / "checkpoint", "olmoe", own_code(OWN_CODE))
    assert convert(source, trusted=True).encode("the there 12[EOS]") == [257, 258, 259, 32, 49, 50, 263]
    assert [path.name for path in Checkpoint(source, True).code_files()] == ["tokenization_own.py"]


def test_code_that_cannot_be_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class whose pattern nobody knows is refused by its name."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = OWN_CODE.replace("    pat_str =", "    pattern =").replace("self.pat_str", "self.pattern")
    source = checkpoint(tmp_path / "checkpoint", "olmoe", own_code(code))
    with pytest.raises(BadInput, match=r"Python code \(Own\) that cannot be written down"):
        convert(source, trusted=True)
