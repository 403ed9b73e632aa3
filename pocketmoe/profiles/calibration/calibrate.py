"""Runs a calibration text through a bundle and keeps what its experts were given.

The text is cut into windows, each of which starts from nothing; those that are run are taken evenly from all of it.
Afterwards noise is added to one layer's output after the other, to see how much of an error there reaches the logits.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import numpy as np

from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.bundle.reader import Bundle
from pocketmoe.bundle.store import translate_write_errors
from pocketmoe.calibration import Calibration, Hessian, LayerSample
from pocketmoe.errors import BadInput
from pocketmoe.profiles.quality.divergence import compare_rows
from pocketmoe.profiles.quality.quality import Slice
from pocketmoe.runtime.backends.choice import BackendMaker, BackendName
from pocketmoe.runtime.engine.engine import Engine
from pocketmoe.runtime.engine.memory_plan import MemoryRequest
from pocketmoe.runtime.engine.options import EngineOptions
from pocketmoe.runtime.engine.segments import Values
from pocketmoe.runtime.run import default_threads
from pocketmoe.runtime.tokenizer import Text

WINDOW = 1024  # tokens, less where a model's context is shorter; experts are read about once for each
LEAST_TOKENS = 512
TOKENS = 16384  # of a text, by default
_HELD_OUT = 0.1
_EXPERT_BYTES = 1280 << 20
_NOISE = 0.05  # of the layer's output, in root mean square: well inside where KL grows with its square
_NOISY_TOKENS = 512
_HEAD_WINDOWS = 4  # the head's inputs are looked at in these only: logits of a window are large


def text_windows(bundle: Bundle, slices: Sequence[Slice], tokens: int) -> list[list[int]]:
    """Windows of at most WINDOW tokens, about `tokens` in all, taken evenly from all of the text.

    Raises BadInput for too short a text.
    """
    window = min(WINDOW, bundle.manifest.model.context_length)
    text = Text(bundle)
    encoded = [text.encode(piece.text) for piece in slices if piece.text]
    pieces = [ids[at : at + window] for ids in encoded for at in range(0, len(ids), window)]
    count = max(1, tokens // window)
    chosen = [pieces[i * len(pieces) // count] for i in range(count)] if len(pieces) > count else pieces
    found = sum(map(len, chosen))
    if found < LEAST_TOKENS:
        raise BadInput(f"{found} tokens are too few to calibrate with, {LEAST_TOKENS} the least", "Give more text.")
    return chosen


def hold_out(slices: Sequence[Slice]) -> tuple[list[Slice], list[Slice]]:
    """What to calibrate by, and the last tenth of each text, to measure by what came of it."""
    cuts = [int(len(piece.text) * (1 - _HELD_OUT)) for piece in slices]
    kept = [Slice(piece.name, piece.text[:cut]) for piece, cut in zip(slices, cuts, strict=True)]
    return kept, [Slice(piece.name, piece.text[cut:]) for piece, cut in zip(slices, cuts, strict=True)]


def sha256_of_text(slices: Sequence[Slice]) -> str:
    return hashlib.sha256("".join(piece.text for piece in slices).encode()).hexdigest()


def calibrate(
    bundle: Bundle,
    slices: Sequence[Slice],
    *,
    scratch: Path,
    activation_outputs: Mapping[str, str] | None = None,
    tokens: int = TOKENS,
    options: EngineOptions | None = None,
    progress: Progress = no_progress,
) -> Calibration:
    """Run about `tokens` tokens of text, and say what each layer's experts were given and how much errors there matter.

    `activation_outputs`: by name of a dense tensor the segment output that has its inputs, float32 [..., K], where the
    bundle was made to give them.
    `scratch`: a directory with room for 4 bytes x tokens x width x layers, in files without a name that go with the
    process. `options`: by default `modest`; the capacity in them is replaced by a window's. Raises BadInput for too
    short a text and for activations that are not finite, OutputError, and what opening and running an engine raises.
    """
    windows = text_windows(bundle, slices, tokens)
    capacity = min(WINDOW, bundle.manifest.model.context_length)
    options = replace(options or modest(bundle), capacity=capacity)
    with contextlib.ExitStack() as stack:
        stack.enter_context(translate_write_errors(scratch))
        files = [stack.enter_context(tempfile.TemporaryFile(dir=scratch)) for _ in bundle.manifest.moe_layers]
        recorders = [_Recorder(file) for file in files]
        engine = stack.enter_context(Engine(bundle, options, progress))
        engine.on_experts = lambda layer, x, ids, weights, _output: recorders[layer].add(x, ids, weights)
        products = _Products(activation_outputs or {})
        engine.on_segment = products.add
        for done, piece in enumerate(windows):
            progress("calibrating", done, len(windows))
            engine.reset()
            with_head = activation_outputs and done < _HEAD_WINDOWS
            engine.feed(piece, rows="all" if with_head else "none")
        progress("calibrating", len(windows), len(windows))
        engine.on_segment = products.drop
        factors = _layer_factors(engine, windows, progress)
        layers = tuple(recorder.sample(factor) for recorder, factor in zip(recorders, factors, strict=True))
    if not all(np.isfinite(layer.x).all() and np.isfinite(layer.expert_weights).all() for layer in layers):
        raise BadInput(f"{bundle.root}: experts are given numbers that are not finite", "Export it again.")
    names = tuple(piece.name for piece in slices)
    return Calibration(layers, products.hessians(), sum(map(len, windows)), names, sha256_of_text(slices))


def modest(bundle: Bundle, backend: BackendName | BackendMaker = "sessions") -> EngineOptions:
    """Options for long windows, each of which needs nearly all experts: one chunk a window, so that each is read once,
    and memory for some of them, since the next window would hardly find more there.

    By default experts run in sessions, so that nothing is packed beside a bundle that is run only this once.
    """
    experts = sum(layer.n_experts for layer in bundle.manifest.moe_layers)
    total = experts * max(kind.nbytes for kind in bundle.manifest.expert_kinds)
    memory = MemoryRequest(expert_share=min(1.0, _EXPERT_BYTES / total))
    return EngineOptions(memory, threads=default_threads(), backend=backend, chunk=WINDOW)


class _Products:
    """Sums of X^T X over what goes into dense tensors, once for each value that several of them share."""

    def __init__(self, outputs: Mapping[str, str]) -> None:
        self._outputs = outputs
        self._sums: dict[str, np.ndarray] = {}
        self._rows: dict[str, int] = {}

    def add(self, values: Values) -> None:
        for name in {name: None for name in self._outputs.values() if name in values}:
            x = values.pop(name).numpy()
            x = x.reshape(-1, x.shape[-1])
            self._sums[name] = x.T @ x + self._sums.get(name, np.float32(0))
            self._rows[name] = self._rows.get(name, 0) + len(x)

    def drop(self, values: Values) -> None:
        for name in {name: None for name in self._outputs.values() if name in values}:
            del values[name]

    def hessians(self) -> dict[str, Hessian]:
        return {t: Hessian(self._sums[v], self._rows[v]) for t, v in self._outputs.items() if v in self._sums}


@dataclass
class _Recorder:
    """One layer's rows, in a file without a name."""

    file: IO[bytes]
    ids: list[np.ndarray] = field(default_factory=list[np.ndarray])
    weights: list[np.ndarray] = field(default_factory=list[np.ndarray])
    width: int = 0

    def add(self, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(x, np.float32).data)
        self.width = x.shape[1]
        self.ids.append(ids.copy())
        self.weights.append(weights.copy())

    def sample(self, factor: float) -> LayerSample:
        self.file.flush()
        ids, weights = np.concatenate(self.ids), np.concatenate(self.weights)
        x = np.memmap(self.file, np.float32, "r", shape=(len(ids), self.width))  # the map keeps the file alive
        return LayerSample(x, ids, weights, factor)


def _layer_factors(engine: Engine, windows: Sequence[Sequence[int]], progress: Progress) -> list[float]:
    """What a squared error of one in each layer's output adds to the KL of the next token, in nats, by layer.

    Measured with white noise: quantization errors have other shapes, but what is compared is layers.
    """
    tokens = max(windows, key=len)[:_NOISY_TOKENS]
    layers = len(engine.bundle.manifest.moe_layers)

    def logits(hook: Callable[..., None] | None) -> np.ndarray:
        engine.reset()
        engine.on_experts = hook
        return engine.feed(tokens, rows="all")

    truth = logits(None)
    factors: list[float] = []
    for layer in range(layers):
        progress("how much each layer matters", layer, layers)
        noise = _Noise(layer)
        kl = float(compare_rows(logits(noise), truth, np.asarray(tokens)).kl.sum())
        factors.append(kl / noise.energy if noise.energy else 0.0)
    progress("how much each layer matters", layers, layers)
    engine.on_experts = None
    return factors


class _Noise:
    """Adds noise to one layer's output, and counts its energy."""

    def __init__(self, layer: int) -> None:
        self._layer = layer
        self._rng = np.random.default_rng(layer)
        self.energy = 0.0

    def __call__(self, layer: int, _x: np.ndarray, _ids: np.ndarray, _weights: np.ndarray, output: np.ndarray) -> None:
        if layer != self._layer:
            return
        noise = self._rng.standard_normal(output.shape, dtype=np.float32)
        noise *= _NOISE * np.sqrt(np.square(output, dtype=np.float64).mean())
        self.energy += float(np.square(noise, dtype=np.float64).sum())
        output += noise
