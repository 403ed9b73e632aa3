"""What the children of `check` do."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pocketmoe.runtime.tokenizer import Text


def build(name: str, checkpoint: str, truth: str) -> int:
    """Make a variant's checkpoint."""
    import torch

    from tests.checkpoints.check import find

    torch.set_num_threads(1)
    torch.manual_seed(0)
    find(name).build(Path(checkpoint), Path(truth))
    return 0


def complete(checkpoint: str, source: str) -> int:
    """Put the model's files of `source` beside a tokenizer."""
    import shutil

    for path in Path(source).iterdir():
        if not path.name.startswith(("tokenizer", "special", "added", "chat_template")):
            shutil.copyfile(path, Path(checkpoint) / path.name)
    return 0


def compare_ids(checkpoint: str, bundle: str, texts: list[str]) -> int:
    """Print for how many texts the bundle's ids are those of transformers' tokenizer."""
    from transformers import AutoTokenizer

    from pocketmoe.bundle.reader import Bundle
    from pocketmoe.runtime.tokenizer import Text

    theirs, ours = AutoTokenizer.from_pretrained(checkpoint), Text(Bundle.open(bundle))
    same = [_encoded(ours, text) == theirs(text)["input_ids"] for text in texts]
    sys.stdout.write(
        json.dumps({"same": sum(same), "first": next((t for t, ok in zip(texts, same, strict=True) if not ok), None)})
    )
    return 0


def _encoded(ours: Text, text: str) -> list[int]:
    """The ids of a text; a text of no tokens, which cannot be continued, is refused."""
    from pocketmoe.errors import BadInput

    try:
        return ours.encode(text)
    except BadInput:
        return []


def compare_logits(checkpoint: str, bundle: str, lengths: list[int]) -> int:
    """Print the largest difference of the last token's logits after random prompts of some lengths."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from pocketmoe.bundle.reader import Bundle
    from pocketmoe.runtime.engine.engine import Engine
    from pocketmoe.runtime.engine.options import EngineOptions

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    worst = 0.0
    for n in lengths:
        ids = np.random.default_rng(n).integers(3, 500, n).tolist()
        with torch.no_grad():
            wanted = model(torch.tensor([ids])).logits[0, -1].numpy()
        with Engine(Bundle.open(bundle), EngineOptions(capacity=n + 4)) as engine:
            worst = max(worst, float(np.abs(engine.feed(ids)[-1] - wanted).max()))
    sys.stdout.write(json.dumps(worst))
    return 0


def few_files(*arguments: str) -> int:
    """The command line with at most 1,024 open files, the limit of most shells."""
    from tests.fuzz.tasks import command

    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    return command(*arguments)
