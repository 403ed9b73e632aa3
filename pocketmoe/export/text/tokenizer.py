"""The tokenizer's part of a bundle: one tokenizer.json that says everything, and the chat template where there is one.

What decides a prompt's ids lies in many places: tokenizer.json, tokenizer_config.json, added_tokens.json,
special_tokens_map.json, vocabularies of sentencepiece or tiktoken, and in transformers' classes. So transformers loads
the tokenizer, its backend is written down, and both are compared (`tokenizer_check`): the runtime needs only the file.
All of that runs in a child process with limits (`isolated`), since the files come from strangers.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from pocketmoe.bundle.manifest import TokenizerCheck
from pocketmoe.bundle.store import translate_write_errors
from pocketmoe.errors import BadInput
from pocketmoe.export.checkpoint.checkpoint import Checkpoint
from pocketmoe.export.tensors.directory import TEXT_BYTES
from pocketmoe.export.tensors.lfs import refuse_pointer
from pocketmoe.export.text import chat_template
from pocketmoe.isolated import IsolatedFailure, Limits, isolated
from pocketmoe.jsonfile import parse_object

if TYPE_CHECKING:
    import tokenizers

DIRECTORY = "tokenizer"
_SUFFIXES = (".json", ".model", ".txt", ".tiktoken", ".bpe", ".vocab", ".jinja")  # of files that tokenizers read
_NOT_OF_TOKENIZERS = (".safetensors.index.json", ".bin.index.json")
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken", "tekken.json", "*.bpe")
_PATHS = ("vocab", "merges", "tokenizer_object")  # and *_file: arguments that transformers would open as files
LIMITS = Limits(memory_bytes=4 << 30, cpu_s=600, wall_s=3600)
_REPAIR = "Put a tokenizer.json beside the weights that transformers can load."


class _Written(msgspec.Struct, tag=True):
    """What the child hands over: the contents of three files, and how they were checked."""

    tokenizer: str
    config: str
    special_tokens: str
    check: TokenizerCheck


class _Refused(msgspec.Struct, tag=True):
    message: str
    remedy: str


def write(checkpoint: Checkpoint, root: Path) -> TokenizerCheck:
    """Write the tokenizer into `root`/tokenizer; return how it was checked.

    Raises BadInput when there is none, when transformers cannot load it, and when one tokenizer.json cannot say all
    that transformers does with it; OutputError.
    """
    directory = root / DIRECTORY
    directory.mkdir()
    with translate_write_errors(root):
        written = _convert(checkpoint, root)
        (directory / "tokenizer.json").write_text(written.tokenizer, encoding="utf-8")
        (directory / "tokenizer_config.json").write_text(written.config, encoding="utf-8")
        (directory / "special_tokens_map.json").write_text(written.special_tokens, encoding="utf-8")
        chat_template.write(checkpoint.root, directory)
    return written.check


def check_vocabulary(source: Path, names: Iterable[str]) -> None:
    """Raises BadInput where none of a checkpoint's files, by their names, could hold a vocabulary."""
    if not any(Path(name).match(pattern) for name in names for pattern in _VOCABULARIES):
        raise BadInput(f"{source} has no tokenizer.json", "Put a tokenizer.json beside the weights.")


def _convert(checkpoint: Checkpoint, root: Path) -> _Written:
    source, code = checkpoint.root, checkpoint.tokenizer_code
    names = sorted(path.name for path in _files(checkpoint))
    check_vocabulary(source, names)
    needs_code = code is not None and not checkpoint.ran_tokenizer_code
    if needs_code and "tokenizer.json" not in names:
        vocabularies = [n for n in names if any(Path(n).match(pattern) for pattern in _VOCABULARIES)]
        raise BadInput(
            f"{source} has no tokenizer.json; its {vocabularies[0]} is read by code that comes with it ({code})",
            "Put a tokenizer.json beside the weights or, if you trust its authors: --trust-remote-code.",
        )
    with tempfile.TemporaryDirectory(dir=root, prefix="tokenizer") as folder:
        stage = Path(folder)
        for name in names:
            shutil.copyfile(source / name, stage / name)
        try:
            answer = isolated(lambda: _convert_here(stage, source, checkpoint), LIMITS)
        except IsolatedFailure as failure:
            reason = str(failure).replace(folder, str(source))
            remedy = "If you trust its authors: --trust-remote-code." if needs_code else _REPAIR
            raise BadInput(f"{source}: transformers cannot load its tokenizer ({reason})", remedy) from failure
    result = msgspec.json.decode(answer, type=_Written | _Refused)
    if isinstance(result, _Refused):
        raise BadInput(result.message, result.remedy)
    return result


def _files(checkpoint: Checkpoint) -> Iterator[Path]:
    """The files of a checkpoint that a tokenizer may be made of. Raises BadInput for those that must not be read."""
    suffixes = (*_SUFFIXES, ".py") if checkpoint.ran_tokenizer_code else _SUFFIXES
    for path in sorted(checkpoint.root.iterdir()):
        if not path.name.endswith(suffixes) or path.name.endswith(_NOT_OF_TOKENIZERS) or path.is_dir():
            continue
        checkpoint.file(path.name)
        if path.stat().st_size > TEXT_BYTES:
            raise BadInput(f"{path} has more than {TEXT_BYTES >> 20} MiB, as no tokenizer's file has", _REPAIR)
        refuse_pointer(path)
        yield path


def _convert_here(stage: Path, source: Path, checkpoint: Checkpoint) -> bytes:
    """In the child: load as transformers does, write as one file, compare."""
    from pocketmoe.export.capture.capture import quiet

    try:
        with quiet():
            return _encoded(_convert_loaded(_load(stage, checkpoint), source))
    except BadInput as error:
        return msgspec.json.encode(_Refused(str(error), error.remedy))


def _encoded(written: _Written) -> bytes:
    return msgspec.json.encode(written)


def _load(stage: Path, checkpoint: Checkpoint) -> Any:
    import tiktoken.load
    from transformers import AutoTokenizer

    def read_uncached(path: str, expected_hash: str | None = None) -> bytes:  # noqa: ARG001 - tiktoken's signature
        return Path(path).read_bytes()

    tiktoken.load.read_file_cached = read_uncached  # which would keep a copy of each vocabulary among temporary files
    _drop_paths(stage / "tokenizer_config.json", checkpoint.root)
    return cast("Any", AutoTokenizer).from_pretrained(
        stage,
        config=checkpoint.config,
        local_files_only=True,
        trust_remote_code=checkpoint.ran_tokenizer_code,
        mistral_format=False,  # else the class depends on whether mistral_common is installed
    )


def _drop_paths(path: Path, source: Path) -> None:
    """Take out settings by which transformers would open a file of the author's choice, anywhere on this machine."""
    if not path.is_file():
        return
    settings = parse_object(path.read_bytes(), source / path.name, _REPAIR)
    kept = {key: value for key, value in settings.items() if not key.endswith("_file") and key not in _PATHS}
    if kept != settings:
        path.write_text(json.dumps(kept), encoding="utf-8")


def _convert_loaded(original: Any, source: Path) -> _Written:
    import tokenizers
    import transformers

    from pocketmoe.export.text import tokenizer_check

    kind = type(original).__name__
    backend = _backend(original, source)
    text = _with_clean_up(backend, original).to_str()
    written = tokenizers.Tokenizer.from_str(text)
    splits = bool(getattr(original, "split_special_tokens", False))
    written.encode_special_tokens = splits
    added = [token.content for _, token in sorted(backend.get_added_tokens_decoder().items())]
    count, digest = tokenizer_check.compare(
        tokenizer_check.Form(
            lambda text: list(original(text)["input_ids"]),
            lambda ids, skip: original.decode(ids, skip_special_tokens=skip),
        ),
        tokenizer_check.Form(
            lambda text: written.encode(text).ids, lambda ids, skip: written.decode(ids, skip_special_tokens=skip)
        ),
        added,
        written.get_vocab_size(),
        f"{source}: its tokenizer ({kind})",
    )
    special = dict(original.special_tokens_map)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": original.model_max_length,
        "padding_side": original.padding_side,
        "clean_up_tokenization_spaces": False,
        **({"split_special_tokens": True} if splits else {}),
        **special,
    }
    check = TokenizerCheck(
        strings=count,
        sha256=digest,
        made_by=kind,
        versions={"tokenizers": tokenizers.__version__, "transformers": transformers.__version__},
        split_special_tokens=splits,
    )
    return _Written(text, json.dumps(config, indent=2), json.dumps(special, indent=2), check)


def _backend(original: Any, source: Path) -> tokenizers.Tokenizer:
    """What transformers' tokenizer hands its texts to, without what each of its calls takes off. Raises BadInput."""
    import tokenizers
    from transformers.convert_slow_tokenizer import SLOW_TO_FAST_CONVERTERS, TikTokenConverter

    backend, kind = getattr(original, "backend_tokenizer", None), type(original).__name__
    if not isinstance(backend, tokenizers.Tokenizer):
        if kind in SLOW_TO_FAST_CONVERTERS:
            backend = SLOW_TO_FAST_CONVERTERS[kind](original).converted()
        elif isinstance(getattr(original, "pat_str", None), str):  # tiktoken with a pattern of its own
            converter = TikTokenConverter(vocab_file=original.vocab_file, pattern=original.pat_str)
            backend = _with_added_tokens(converter.converted(), original.added_tokens_decoder)
        else:
            raise BadInput(
                f"{source}: transformers reads its tokenizer by Python code ({kind}) that cannot be written down",
                _REPAIR,
            )
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None  # which makes ids at random, for training
    return backend


def _with_added_tokens(backend: tokenizers.Tokenizer, added: dict[int, Any]) -> tokenizers.Tokenizer:
    """Added in the order of their ids, where the vocabulary ends."""
    for _, token in sorted(added.items()):
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    return backend


def _with_clean_up(backend: tokenizers.Tokenizer, original: Any) -> tokenizers.Tokenizer:
    """A copy whose decoder also does what `clean_up_tokenization_spaces` does after decoding."""
    import tokenizers
    from tokenizers import decoders

    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    is_bpe = type(backend.model).__name__ == "BPE"
    even_for_bpe = original.__dict__.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
    if not getattr(original, "clean_up_tokenization_spaces", False) or (is_bpe and not even_for_bpe):
        return copy
    first = copy.decoder or decoders.WordPiece(prefix="\0", cleanup=False)  # which puts spaces between tokens
    rules = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"))
    rules += ((" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))
    copy.decoder = decoders.Sequence([first, decoders.Fuse(), *(decoders.Replace(old, new) for old, new in rules)])
    return copy
