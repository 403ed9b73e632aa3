"""What the harness asks of a model, against transformers; whole tasks where lm-evaluation-harness is installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from pocketmoe.bundle.reader import Bundle
from pocketmoe.errors import BadInput
from pocketmoe.harness.model import Scorer
from pocketmoe.harness.tasks import Tasks, TasksRequest
from pocketmoe.pipeline.evaluate import EvaluateRequest, evaluate
from pocketmoe.profiles.quality.evaluation import EvalRequest
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.options import EngineOptions

TASK = """
task: which
dataset_path: json
dataset_kwargs: {data_files: {test: "DATA"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
"""


def test_scores_are_those_of_transformers(
    tiny_bundle: Callable[[str], Bundle], tiny_checkpoint: Callable[[str], Path]
) -> None:
    """log p of what follows, whether it is greedy, and only the last tokens of what is longer than is read at once."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("olmoe")).eval()
    bundle = tiny_bundle("olmoe")
    context, following = [5, 9, 2, 7, 30, 41], [8, 3, 17]
    for length in (64, 4):
        with Engine(bundle, EngineOptions(capacity=64, backend="sessions")) as engine, torch.inference_mode():
            found, greedy = Scorer(engine, bundle, length).score(context, following)
            ids = [*context, *following][-(length + 1) :]
            rows = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)[-1 - len(following) : -1]
        assert found == pytest.approx(float(rows[range(3), following].sum()), abs=1e-3)
        assert greedy == (rows.argmax(-1).tolist() == following)


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("lm_eval"), reason="lm-evaluation-harness is not installed (extra lm-eval)")
def test_a_task_of_ones_own(
    tiny_bundle: Callable[[str], Bundle], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Against itself, as a bundle and as the checkpoint, nothing falls; a gate on what is not measured is refused."""
    data = tmp_path / "data.jsonl"
    rows = [{"text": "a fox", "choices": [" jumps", " sleeps"], "answer": n % 2} for n in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "which.yaml").write_text(TASK.replace("DATA", str(data)))
    bundle = tiny_bundle("olmoe")
    asked = TasksRequest(tasks=["which"], folder=tmp_path)
    assert Tasks(asked).metrics == {"which": ["acc"]}
    gate = tmp_path / "gate"
    gate.write_text("which: acc >= 0.5\nwhich: acc_fall <= 0\n")
    for reference in (bundle.root, tiny_checkpoint("olmoe")):
        by = EvalRequest(text=None, reference=reference, gate=gate)
        found = evaluate(bundle.root, EvaluateRequest(by=by, tasks=asked))
        (figure,) = found.tasks
        assert (figure.task, figure.metric, figure.value, figure.examples) == ("which", "acc", 0.5, 4)
        assert (figure.reference, figure.change_stderr) == (0.5, 0.0)
        assert [(v.scope, v.metric, v.value, v.passed) for v in found.verdicts] == [
            ("which", "acc", 0.5, True),
            ("which", "acc_fall", 0.0, True),
        ]
    gate.write_text("which: acc_norm >= 0.5")
    with pytest.raises(BadInput, match="has no figure 'acc_norm'"):
        evaluate(bundle.root, EvaluateRequest(by=EvalRequest(text=None, gate=gate), tasks=asked))
