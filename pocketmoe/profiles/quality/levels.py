"""What int8 activations change: greedy answers of a quantized bundle, and of the same weights with float32 activations.

MatMulNBits at accuracy level 4 rounds activations to int8, which flips greedy tokens (onnxruntime issue 29849). How far
that is from level 0, whose weights are the same bytes, no comparison with the unquantized model tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pocketmoe.bundle.manifest import GRAPHS
from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.writer import write_with_graphs
from pocketmoe.profiles.quality.quality import Slice, evaluate
from pocketmoe.profiles.quality.report import LevelComparison, levels_of
from pocketmoe.runtime.backends.onnx_wire import with_accuracy_level
from pocketmoe.runtime.engine.options import EngineOptions

_GIVEN_TOKENS = 64  # of the first text: what is compared is the answer


def compare_levels(
    bundle: Bundle,
    slices: Sequence[Slice],
    *,
    scratch: Path,
    options: EngineOptions | None = None,
    progress: Progress = no_progress,
) -> LevelComparison | None:
    """Let both levels answer one prompt with 64 tokens; None for a bundle that computes at level 0 alone.

    `scratch`: a directory for a copy of the bundle's graphs, best on its file system. Experts run in sessions, so that
    nothing is packed for a copy that is used once. Raises what `evaluate` raises.
    """
    if set(levels_of(bundle)) <= {0}:
        return None
    exact = write_at_level(bundle, scratch / "level-0", 0)
    sessions = replace((options or EngineOptions()).exactly(), backend="sessions")
    report = evaluate(
        bundle,
        slices[:1],
        reference=exact,
        options=sessions,
        max_tokens=_GIVEN_TOKENS,
        free_prompts=1,
        progress=progress,
    )
    answers = report.overall.free_running
    assert answers is not None
    return LevelComparison(answers.tokens, answers.same_tokens.value, answers.mean_kl_nats.value)


def write_at_level(bundle: Bundle, target: Path, level: int) -> Bundle:
    """A copy of a bundle that computes at another accuracy level; large files are linked to where they can be."""
    names = [name for name in bundle.manifest.files if name.startswith(GRAPHS) and name.endswith(".onnx")]
    graphs = {name: with_accuracy_level(bundle.path(name).read_bytes(), level) for name in names}
    return write_with_graphs(bundle, target, graphs, bundle.manifest)
