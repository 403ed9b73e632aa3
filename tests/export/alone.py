"""Runs a portable model in a process that has numpy and onnxruntime and nothing else, by the program of the manual."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.hang import HANG_S

PAGE = Path(__file__).parents[2] / "docs" / "PORTABLE.md"
_ABSENT = ("pocketmoe", "onnx", "onnx_ir", "torch", "transformers")
_PROGRAM = """
import sys
sys.path.append(sys.argv[1])
from importlib.util import find_spec
for name in {absent}:
    assert find_spec(name) is None, f"{{name}} can be imported"
{manual}
model, out, pieces, count = sys.argv[2], sys.argv[3], json.loads(sys.argv[4]), int(sys.argv[5])
options = ort.SessionOptions()
options.intra_op_num_threads = 1
text = PortableText(ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]))
rows = [text.feed(piece) for piece in pieces]
while len(rows) < len(pieces) + count - 1:
    rows.append(text.feed([int(rows[-1][-1].argmax())]))
np.save(out, np.concatenate(rows))
"""


def run_alone(model: Path, pieces: Sequence[Sequence[int]], count: int, scratch: Path) -> np.ndarray:
    """Feed a prompt in `pieces` and `count` - 1 greedy tokens; the logits of them all, float32 [tokens, vocabulary]."""
    site = scratch / "site"
    site.mkdir(exist_ok=True)
    for name in ("numpy", "onnxruntime"):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        package = Path(spec.origin).parent
        for directory in (package, package.with_name(f"{name}.libs")):
            if directory.exists() and not (site / directory.name).exists():
                (site / directory.name).symlink_to(directory)
    program = _PROGRAM.format(absent=_ABSENT, manual=manual())
    args = [str(site), str(model), str(scratch / "logits.npy"), json.dumps([*map(list, pieces)]), str(count)]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, *args], capture_output=True, text=True, check=False, timeout=HANG_S
    )
    assert done.returncode == 0, done.stderr
    return np.load(scratch / "logits.npy")


def manual() -> str:
    """The Python program in docs/PORTABLE.md."""
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return program


def chosen(logits: np.ndarray, count: int) -> list[int]:
    """The tokens that the last `count` rows choose."""
    return logits[-count:].argmax(axis=1).tolist()
