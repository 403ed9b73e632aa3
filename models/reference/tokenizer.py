"""Train the byte-level BPE tokenizer of the reference model and encode the training text.

Usage: ``python tokenizer.py [--work DIR]``, after corpus.py. Follows the habits of OLMoE: no BOS token,
``<|endoftext|>`` ends a document and ``<|padding|>`` pads; all 256 bytes are in the alphabet, so any UTF-8
text survives a round trip.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
VOCAB_SIZE = 4096
EOS = "<|endoftext|>"
PAD = "<|padding|>"
MAX_LENGTH = 1024
TRAIN_CHARS_PER_KIND = 6_000_000


def texts(path: Path) -> Iterator[str]:
    """The documents of one training file, in their fixed order."""
    with path.open() as lines:
        for line in lines:
            yield json.loads(line)["text"]


def balanced(paths: list[Path], limit: int) -> Iterator[str]:
    """Documents of each kind up to ``limit`` characters, so that no kind dominates the merges."""
    for path in paths:
        used = 0
        for text in texts(path):
            yield text
            used += len(text)
            if used > limit:
                break


def train_tokenizer(paths: list[Path]) -> Tokenizer:
    """A byte-level BPE of VOCAB_SIZE entries; ids 0 and 1 are the end and padding tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(balanced(paths, TRAIN_CHARS_PER_KIND), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    config = json.loads(settings.read_text())
    config.pop("backend", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 and 5 both know
    settings.write_text(json.dumps(config, indent=2) + "\n")
    special = {"eos_token": EOS, "pad_token": PAD}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


def encode(tokenizer: Tokenizer, path: Path) -> np.ndarray:
    """All documents of one kind as one array (N,) of uint16, each followed by the end token."""
    eos = tokenizer.token_to_id(EOS)
    rows = (np.array([*tokenizer.encode(text).ids, eos], dtype=np.uint16) for text in texts(path))
    return np.concatenate(list(rows))


def main() -> None:
    """Train, save beside the checkpoint, encode."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="the work folder of corpus.py")
    parser.add_argument("--out", type=Path, default=HERE / "checkpoint", help="where the tokenizer goes")
    options = parser.parse_args()
    paths = sorted((options.work / "train").glob("*.jsonl"))
    tokenizer = train_tokenizer(paths)
    options.out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, options.out)
    folder = options.work / "tokens"
    folder.mkdir(exist_ok=True)
    for path in paths:
        np.save(folder / f"{path.stem}.npy", encode(tokenizer, path), allow_pickle=False)


if __name__ == "__main__":
    main()
