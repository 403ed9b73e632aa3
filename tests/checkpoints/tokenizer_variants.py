"""Tokenizers and chat templates: one of each construct that published ones use."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from tests import tiny
from tests.checkpoints.variant import Variant, edit_json

_LINE = "the quick brown fox jumps over a lazy dog once upon a time there was a little girl in a village near a wood"
_TOKEN: dict[str, Any] = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
TEXTS = (
    "The quick brown fox",
    "  two  spaces ",
    "Don't stop! It's 12345.67",
    "line\n\nbreak\ttab",
    "é\u4f60\u597d\U0001f600",
    "<s>the<new>fox</s>",
    "a <|im_start|> b",
    "e\u0301\u00a0x\u200d",
    "HELLO hello",
    "",
)
_PIECES = (
    *TEXTS[:9],
    " ",
    "\n",
    "<s>",
    "</s>",
    "<new>",
    "<|im_start|>",
    "<unk>",
    "é",
    "\U0001f600",
    "\u200d",
    "'s",
    "7",
    "...",
    "\x07",
)


def texts(count: int = 200) -> list[str]:
    """TEXTS, and mixtures of what tokenizers treat in their own ways."""
    random = Random(14)
    mixed = ["".join(random.choices(_PIECES, k=random.randrange(1, 8))) for _ in range(count - len(TEXTS))]
    return [*TEXTS, *mixed]


def _tokenizer_json(directory: Path, change: Callable[[dict[str, Any]], object] | None = None, **settings: Any) -> None:
    """The byte-level BPE of `tiny`, changed, with other settings in tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    tiny.save_tokenizer(directory)
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    if change is not None:
        document = json.loads((directory / "tokenizer.json").read_text())
        change(document)
        (directory / "tokenizer.json").write_text(json.dumps(document))
    edit_json(directory / "tokenizer_config.json", **settings)


def _put(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda document: document.__setitem__(name, value)


def _bpe(change: Any = None, **settings: Any) -> Callable[[Path, Path], None]:
    return lambda directory, _truth: _tokenizer_json(directory, change, **settings)


def _made(make: Callable[[], Any], **settings: Any) -> Callable[[Path, Path], None]:
    """A tokenizer by the tokenizers library."""

    def build(directory: Path, _truth: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        make().save(str(directory / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **settings}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))

    return build


def _trained(kind: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    special = ["<s>", "</s>", "<unk>"]
    lines = [_LINE] * 4
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    elif kind == "wordlevel":
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def _byte_fallback() -> Any:
    """BPE over characters with a token for each byte, and a marker for spaces: as Llama's and Mixtral's."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    merges = [("t", "h"), ("th", "e"), ("o", "n"), ("\u2581", "the"), ("a", "t")]
    pieces += ["".join(merge) for merge in merges]
    model = models.BPE(
        {p: n for n, p in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, level]}


_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BOS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
}


def _added_json(directory: Path, _truth: Path) -> None:
    _tokenizer_json(directory)
    (directory / "added_tokens.json").write_text('{"<new>": 500, "<|im_start|>": 501}')


def _special_map(directory: Path, _truth: Path) -> None:
    _tokenizer_json(directory, bos_token=None)
    edit_json(directory / "tokenizer_config.json", drop=("bos_token", "eos_token"))
    extra = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "additional_special_tokens": ["<new>", "<|im_start|>"],
    }
    (directory / "special_tokens_map.json").write_text(json.dumps(extra))


def _gpt2_files(directory: Path, _truth: Path) -> None:
    _tokenizer_json(directory)
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    (directory / "tokenizer.json").unlink()
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def _sentencepiece(directory: Path, _truth: Path) -> None:
    """tokenizer.model alone, written as the protobuf that it is (sentencepiece_model.proto)."""
    directory.mkdir(parents=True, exist_ok=True)
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{n:02X}>", 6) for n in range(256))]
    pieces += [(piece, 1) for piece in ("\u2581", *"abcdefghijklmnopqrstuvwxyz", "th", "the", "\u2581the")]

    def message(number: int, payload: bytes) -> bytes:
        return bytes([number << 3 | 2, len(payload)]) + payload

    out = b""
    for rank, (piece, kind) in enumerate(pieces):
        body = message(1, piece.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", -float(rank))
        out += message(1, body + (bytes([3 << 3, kind]) if kind != 1 else b""))
    trainer = bytes([3 << 3, 2, *_varint(35 << 3), 1])  # BPE, byte_fallback
    (directory / "tokenizer.model").write_bytes(out + message(2, trainer))
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def _varint(number: int) -> list[int]:
    return [number] if number < 128 else [number & 127 | 128, *_varint(number >> 7)]


def _tiktoken(directory: Path, _truth: Path) -> None:
    """Ranks alone, whose class would come as code (Kimi)."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [base64.b64encode(bytes([n])) + b" %d" % n for n in range(256)]
    (directory / "tiktoken.model").write_bytes(b"\n".join(lines))
    config = {
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def _limits(name: str) -> dict[str, Any]:
    if name == "truncation":
        return {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    return {
        "strategy": {"Fixed": 64},
        "direction": name,
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "</s>",
    }


def _decoder(token: str, number: int, **changes: Any) -> dict[str, Any]:
    return {str(number): {"content": token, **_TOKEN, **changes}}


_TOKENIZERS: tuple[tuple[str, Callable[[Path, Path], None]], ...] = (
    ("byte-level BPE", _bpe()),
    ("BOS by the post-processor", _bpe(_put("post_processor", _BOS))),
    ("BOS by add_bos_token alone", _bpe(add_bos_token=True, tokenizer_class="LlamaTokenizerFast")),
    ("add_bos_token false over a post-processor", _bpe(_put("post_processor", _BOS), add_bos_token=False)),
    ("add_eos_token", _bpe(add_eos_token=True)),
    ("truncation left in tokenizer.json", _bpe(_put("truncation", _limits("truncation")))),
    ("padding to 64 left in tokenizer.json, left", _bpe(_put("padding", _limits("Left")))),
    ("padding to 64 left in tokenizer.json, right", _bpe(_put("padding", _limits("Right")))),
    (
        "added tokens only in tokenizer_config.json",
        _bpe(added_tokens_decoder={**_decoder("<new>", 500), **_decoder("<|im_start|>", 501)}),
    ),
    ("an added token that strips spaces", _bpe(added_tokens_decoder=_decoder("<new>", 500, lstrip=True, rstrip=True))),
    (
        "an added token that is no special one",
        _bpe(added_tokens_decoder=_decoder("<new>", 500, special=False, normalized=True)),
    ),
    ("added tokens only in added_tokens.json", _added_json),
    ("special tokens only in special_tokens_map.json", _special_map),
    ("additional_special_tokens", _bpe(additional_special_tokens=["<new>", "<|im_start|>"])),
    ("a pattern of GPT-4's kind (Qwen, OLMoE)", _bpe(_put("pre_tokenizer", _split(_GPT4)))),
    (
        "NFC, lower case",
        _bpe(_put("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]})),
    ),
    (
        "a prefix space",
        _bpe(
            _put(
                "pre_tokenizer",
                {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            )
        ),
    ),
    ("BPE with byte fallback (Mixtral, Phi)", _made(_byte_fallback, unk_token="<unk>")),
    (
        "BPE with byte fallback under LlamaTokenizer",
        _made(_byte_fallback, unk_token="<unk>", tokenizer_class="LlamaTokenizer"),
    ),
    ("WordPiece", _made(lambda: _trained("wordpiece"), unk_token="<unk>")),
    ("Unigram", _made(lambda: _trained("unigram"), unk_token="<unk>")),
    ("whole words", _made(lambda: _trained("wordlevel"), unk_token="<unk>")),
    ("clean_up_tokenization_spaces", _bpe(clean_up_tokenization_spaces=True)),
    ("vocab.json and merges.txt alone", _gpt2_files),
    ("tokenizer.model alone (sentencepiece)", _sentencepiece),
)

_HEAD = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"
_TEMPLATES: tuple[tuple[str, Any], ...] = (
    ("messages in a loop", _HEAD),
    ("bos_token", "{{ bos_token }}" + _HEAD),
    ("eos_token, pad_token, unk_token", "{{ eos_token }}{{ pad_token }}{{ unk_token }}" + _HEAD),
    ("strftime_now", "{{ strftime_now('%Y-%m') }}" + _HEAD),
    (
        "break and continue",
        "{% for m in messages %}{% if loop.index0 %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
    ),
    ("the generation tag", "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"),
    ("tojson without escapes", "{{ {'a': '<é> & \\'', 'b': [1]}|tojson }}" + _HEAD),
    ("tojson with an indent", "{{ messages|tojson(indent=2) }}"),
    (
        "tools and documents undefined",
        "{% if tools is defined and tools %}T{% endif %}{% if not documents %}D{% endif %}" + _HEAD,
    ),
    ("tools is none", "{% if tools is none %}N{% else %}S{% endif %}" + _HEAD),
    (
        "enable_thinking undefined",
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}" + _HEAD,
    ),
    ("add_generation_prompt", "{{ messages[0].content }}{% if add_generation_prompt %}[go]{% endif %}"),
    (
        "a namespace",
        "{% set ns = namespace(s='') %}{% for m in messages %}{% set ns.s = ns.s + m.content %}{% endfor %}{{ ns.s }}:",
    ),
    ("a macro", "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages[0].content) }}"),
    (
        "content by parts",
        "{% set c = messages[0].content %}{% if c is string %}{{ c }}{% else %}{{ c[0].text }}{% endif %}",
    ),
    ("trimmed blocks", "  {% if true %}\n  x\n  {% endif %}\n" + _HEAD + "\n"),
    ("whitespace control", "{{- '' -}} x {%- if 1 -%} y {%- endif %} z" + _HEAD),
    ("string methods", "{{ messages[0]['content'].strip().split(' ')|join('-')|upper }}"),
    ("messages selected and reversed", "{{ (messages|selectattr('role', 'equalto', 'user')|list)[::-1][0].content }}"),
    ("special tokens written out", "<s>{{ messages[0].content }}</s>"),
    ("several, by name", [{"name": "default", "template": _HEAD}, {"name": "tool_use", "template": "{{ tools }}"}]),
    ("a template and a post-processor that both begin with BOS", "{{ bos_token }}" + _HEAD),
)


def _template(template: Any, twice: bool) -> Callable[[Path, Path], None]:
    change = _put("post_processor", _BOS) if twice else None
    return _bpe(change, chat_template=template, unk_token="</s>", pad_token="</s>")


def variants() -> list[Variant]:
    found = [
        Variant(
            "tokenizer",
            example,
            build,
            prompts=TEXTS[:9],
            tokens=6,
            tokenizer_only=True,
            measure="texts",
            model="olmoe" if build is _gpt2_files else "mixtral",
        )
        for example, build in _TOKENIZERS
    ]
    prompts = ("The quick brown fox", "  é <x> 'q' & \"r\"\n\n", "</s>")
    found += [
        Variant(
            "chat template",
            example,
            _template(template, "post-processor" in example),
            prompts=prompts,
            chat=True,
            tokens=6,
            tokenizer_only=True,
        )
        for example, template in _TEMPLATES
    ]
    return [
        *found,
        Variant(
            "tokenizer",
            "tiktoken.model alone, its class as code",
            _tiktoken,
            refused="tiktoken",
            or_tokens=True,
            tokenizer_only=True,
        ),
        Variant(
            "chat template",
            "raise_exception for every conversation",
            _template("{{ raise_exception('no users here') }}", False),
            refused="no users here",
            chat=True,
            tokenizer_only=True,
        ),
    ]
