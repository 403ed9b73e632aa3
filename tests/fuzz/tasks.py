"""What the forked children do."""

from __future__ import annotations

import json
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.fuzz.zygote import ROOT


def command(*arguments: str) -> int:
    """The command line, by the entry that an installed program has."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["pocketmoe"].partition(":")
    entry = getattr(import_module(module), function)
    import sys

    sys.argv = ["pocketmoe", *arguments]
    return entry()


def make_checkpoint(family: str, target: str, changes: dict[str, Any]) -> int:
    """A tiny random checkpoint."""
    import torch

    from tests import tiny

    torch.set_num_threads(1)
    tiny.save_checkpoint(Path(target), tiny.make_model(family, **changes))
    return 0


def retokenize(checkpoint: str, bundle: str) -> int:
    """Give a bundle the tokenizer that an export of this checkpoint would give it: the product's writer, and a seal.

    It runs as a command of the product's own group, so that errors come out as they do from an export.
    """
    from pocketmoe.cli import main

    @main.command(hidden=True)
    def retokenize() -> None:
        _retokenize(Path(checkpoint), Path(bundle))

    return command("retokenize")


def _retokenize(source: Path, root: Path) -> None:
    import shutil

    import msgspec

    from pocketmoe.bundle.manifest import MANIFEST, read_manifest, seal
    from pocketmoe.bundle.writer import list_files
    from pocketmoe.export.checkpoint.checkpoint import Checkpoint
    from pocketmoe.export.text import tokenizer

    shutil.rmtree(root / "tokenizer")
    shutil.rmtree(root / "packed", ignore_errors=True)
    checked = tokenizer.write(Checkpoint(source), root)
    manifest = read_manifest(root / MANIFEST)
    kept = {name for name in manifest.files if not name.startswith("tokenizer/")}
    files = {n: e for n, e in list_files(root, {}).items() if n in kept or n.startswith("tokenizer/")}
    (root / MANIFEST).write_bytes(seal(msgspec.structs.replace(manifest, files=files, tokenizer=checked)))


def transformers_answer(checkpoint: str, prompts: list[dict[str, Any]], n: int, target: str) -> int:
    """Write what transformers answers to prompts, greedily in float32: ids in, ids out, and how close the call was.

    A prompt is {"text": ..., "chat": bool}. `margins` are the differences of the two largest logits at each step.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, experts_implementation="eager", attn_implementation="eager"
    ).eval()
    answers = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt["text"]}]
        if prompt["chat"] and tokenizer.chat_template:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        else:
            ids = tokenizer(prompt["text"])["input_ids"]
        with torch.no_grad():
            out = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=n,
                do_sample=False,
                num_beams=1,
                output_scores=True,
                return_dict_in_generate=True,
            )
        tops = [score[0].topk(2).values for score in out.scores]
        answers.append(
            {
                "prompt": ids,
                "tokens": out.sequences[0, len(ids) :].tolist(),
                "margins": [float(top[0] - top[1]) for top in tops],
            }
        )
    Path(target).write_text(json.dumps(answers))
    return 0


def warm() -> None:
    """Fill what torch and transformers keep of their first export and answer; nothing of the product runs here.

    An export costs half after it, an answer 0.03 s instead of 4.
    """
    import tempfile

    import torch
    from tqdm import tqdm
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    from tests import tiny

    tqdm.monitor_interval = 0  # else a progress bar starts a thread, which a fork does not take along
    torch.set_num_threads(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = tiny.make_model("llama", **sizes, intermediate_size=16)
    ids = torch.tensor([[5, 6, 7]])
    OnnxExporter().export(model, {"input_ids": ids}, OnnxConfig(dynamic=True, ort_fusions="cpu"))
    for family in ("mixtral", "qwen3_moe"):
        with tempfile.TemporaryDirectory() as directory:
            root = Path(directory)
            experts = {"num_experts": 2, "num_local_experts": 2, "moe_intermediate_size": 16, "intermediate_size": 16}
            tiny.save_checkpoint(root / "c", tiny.make_model(family, **sizes, **experts))
            prompt = {"text": "once", "chat": True}
            transformers_answer(str(root / "c"), [prompt], 2, str(root / "answer.json"))
