"""lm-eval: the same tasks through the server and through transformers, on the same checkpoint."""

import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

import lm_eval
from lm_eval.tasks import TaskManager

URL, MODEL, CHECKPOINT, TEXTS = sys.argv[1:5]
HERE = Path(__file__).parent
CHOICES, DOCUMENTS, BEGINNINGS = 8, 2, 4


def pieces(count: int, words: int) -> list[list[str]]:
    """So many stretches of words of the held-out texts, in the order of the texts."""
    text = (Path(TEXTS) / "docs.txt").read_text(encoding="utf-8").split()
    step = len(text) // count
    return [text[start : start + words] for start in range(0, step * count, step)]


def write_data(folder: Path) -> None:
    """What comes next, of four; whole stretches to be predicted; beginnings to be continued."""
    cut = [(" ".join(words[:40]), " " + " ".join(words[40:48])) for words in pieces(CHOICES, 48)]
    choices = []
    for index, (text, following) in enumerate(cut):
        offered = [cut[(index + shift) % CHOICES][1] for shift in (3, 5, 6)]
        offered.insert(index % 4, following)
        choices.append({"text": text, "choices": offered, "answer": index % 4})
    bits = [{"text": " ".join(words)} for words in pieces(DOCUMENTS, 150)]
    begun = [{"text": " ".join(words[:30]), "next": " ".join(words[30:45])} for words in pieces(BEGINNINGS, 45)]
    for name, rows in (("choice", choices), ("bits", bits), ("continue", begun)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for task in (HERE / "tasks").glob("*.yaml"):
        (folder / task.name).write_text(task.read_text().replace("{{data}}", str(folder)))


def scores(kind: str, tasks: list[str], chat: bool, **options: object) -> dict[str, float]:
    """The metrics of some tasks, each by its name."""
    found = lm_eval.simple_evaluate(
        model=kind,
        model_args=options,
        tasks=tasks,
        task_manager=MANAGER,
        apply_chat_template=chat,
        bootstrap_iters=0,
        batch_size=1,
    )
    return {
        f"{task}/{metric.removesuffix(',none')}": value
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if metric.endswith(",none") and "stderr" not in metric
    }


with tempfile.TemporaryDirectory() as data:
    os.environ["HF_DATASETS_CACHE"] = f"{data}/cache"
    write_data(Path(data))
    MANAGER = TaskManager(include_path=data, include_defaults=False)
    server = {"model": MODEL, "tokenizer": CHECKPOINT, "tokenizer_backend": "huggingface", "max_length": 1024}
    scored, told = ["heldout_choice", "heldout_bits"], ["heldout_continue"]
    rows = [
        ("local-completions", scored + told, False, {**server, "base_url": f"{URL}/v1/completions"}),
        ("local-chat-completions", told, True, {**server, "base_url": f"{URL}/v1/chat/completions"}),
    ]
    print(f"{'model type':24}{'task and metric':30}{'server':>10}{'transformers':>14}")
    for kind, tasks, chat, options in rows:
        served = scores(kind, tasks, chat, **options)
        reference = scores("hf", tasks, chat, pretrained=CHECKPOINT, dtype="float32", device="cpu")
        for name, value in served.items():
            print(f"{kind:24}{name:30}{value:10.4f}{reference[name]:14.4f}")
            assert abs(value - reference[name]) < 1e-3, name
