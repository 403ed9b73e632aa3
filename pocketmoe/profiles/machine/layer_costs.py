"""What a layer takes whatever its size, by a small bundle (`sample.zip`) that goes through the whole runtime.

Its weights take no time, so that what is measured is all the rest: small operators, the calls of experts, Python. In a
large model each layer's weights displace the caches in between, which makes all of that two to three times as slow:
so it is measured with the caches displaced, too. And with no expert in memory, where each is read and then computed by
itself; and with reads of 2 ms, after which processors have slept.

tests/profiles/machine/make_sample.py makes the bundle.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import PAGE
from pocketmoe.profiles.machine.pace import Pace
from pocketmoe.profiles.profile import LONG_READ_S, LayerCosts
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions

SAMPLE = Path(__file__).with_name("sample.zip")
TOKENS, TOKENS_FAR, TOKENS_WAITING = 64, 12, 8
_SETTLING = 2  # tokens before it is timed
_CAPACITY = 128
_IDS = 64  # of tokens that are fed, over and over


@dataclass(frozen=True)
class _Parts:
    """Seconds of a median decode step."""

    segments_s: float
    experts_s: float
    python_s: float
    misses: float

    @property
    def total_s(self) -> float:
        return self.segments_s + self.between_s

    @property
    def between_s(self) -> float:
        """Between segments."""
        return self.experts_s + self.python_s


def measure_layer(threads: int, displace: Callable[[], object], pace: Pace) -> LayerCosts:
    """The costs at the mean pace, in some 2 s, with so many threads in all. `displace`: what empties the caches.

    One thread runs it, since it is small; but where there are others, it has a processor to itself. Raises OSError, and
    what a bundle raises.
    """
    with tempfile.TemporaryDirectory() as place:
        with zipfile.ZipFile(SAMPLE) as archive:
            archive.extractall(place)
        bundle = Bundle.open(Path(place))
        layers = len(bundle.manifest.moe_layers)
        chosen = bundle.manifest.moe_layers[0].top_k
        with _opened(bundle, threads, expert_share=1.0) as engine:
            near = _median_step(engine, pace, TOKENS)
            far = _median_step(engine, pace, TOKENS_FAR, displace)
        with _opened(bundle, threads, expert_share=0.0) as engine:
            missing = _median_step(engine, pace, TOKENS_FAR)
        with _opened(bundle, threads, expert_share=0.0, read_bytes_per_s=PAGE / LONG_READ_S) as engine:
            waiting = _median_step(engine, pace, TOKENS_WAITING)
    parts, calls = layers + 1, layers * chosen  # the head counts as one part more
    misses = max(1.0, missing.misses)
    return LayerCosts(
        near_segment_s=near.segments_s / parts,
        near_expert_s=near.experts_s / calls,
        near_python_s=near.python_s / layers,
        far_segment_s=max(far.segments_s, near.segments_s) / parts,
        far_expert_s=max(far.experts_s, near.experts_s) / calls,
        far_python_s=max(far.python_s, near.python_s) / layers,
        miss_s=max(0.0, missing.total_s - near.total_s) / misses,
        long_miss_s=max(0.0, waiting.between_s - missing.between_s) / misses,
        long_wait_s=max(0.0, waiting.segments_s - missing.segments_s) / layers,
    )


def _opened(bundle: Bundle, threads: int, expert_share: float, read_bytes_per_s: float | None = None) -> Engine:
    memory = MemoryRequest(expert_share=expert_share)
    return Engine(
        bundle,
        EngineOptions(
            memory=memory, capacity=_CAPACITY, threads=threads, prefetch="off", read_bytes_per_s=read_bytes_per_s
        ),
    )


def _median_step(engine: Engine, pace: Pace, tokens: int, displace: Callable[[], object] | None = None) -> _Parts:
    """Of so many steps after a few. `displace` is called in every layer, and its time left out: then
    memory decides, which has another pace."""
    displacing: list[float] = []
    if displace is not None:
        engine.on_routes = lambda _layer, _ids: displacing.append(_seconds(displace))
    steps: list[_Parts] = []
    for number in range(_SETTLING + tokens):
        before = _counted(engine)
        displacing.clear()
        engine.feed([number % _IDS])
        total, segments, experts, waiting, misses = (
            now - then for now, then in zip(_counted(engine), before, strict=True)
        )
        now, python = 1.0 if displace else pace(), total - segments - experts - waiting - sum(displacing)
        steps.append(_Parts(segments / now, experts / now, python / now, misses))
    names = ("segments_s", "experts_s", "python_s", "misses")
    segments, experts, python, misses = (
        statistics.median(getattr(step, name) for step in steps[_SETTLING:]) for name in names
    )
    scale = 1.0 if displace else pace.mean_s
    return _Parts(scale * segments, scale * experts, scale * python, misses)


def _counted(engine: Engine) -> tuple[float, float, float, float, int]:
    times = engine.times
    return times.total_s, times.segments_s, times.experts_s, times.waiting_s, engine.stats.misses


def _seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def displacer(nbytes: int) -> Callable[[], object]:
    """What reads so many bytes of memory, after which caches hold them and little else."""
    data = np.ones(nbytes // 8, np.uint64)
    return lambda: np.bitwise_or.reduce(data)
