"""What tokens leave behind for later ones: key and value caches, recurrent states.

A cache that grows is one buffer of the full capacity which attention fills in place, where the graph allows it; else
each step returns a new one. Either way the budget has promised the full size from the start.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnxruntime as ort

from pocketmoe.bundle.manifest import Manifest, State
from pocketmoe.errors import DamagedFile


def state_bytes(specs: Sequence[State], capacity: int) -> int:
    """Memory for all states at `capacity` tokens, in bytes; the copy that a step makes of one of them included."""
    sizes = [spec.nbytes(capacity) for spec in specs]
    copied = [size for spec, size in zip(specs, sizes, strict=True) if not spec.in_place]
    return sum(sizes) + 2 * max(copied, default=0)


def kept_bytes(specs: Sequence[State]) -> int:
    """Memory for what `States.keep` keeps, in bytes."""
    return sum(spec.nbytes(1) for spec in specs if spec.growing_axis is None)


class States:
    """The states of one text, as ONNX Runtime values under their graph names."""

    def __init__(self, manifest: Manifest, capacity: int) -> None:
        self._specs = manifest.states
        self.local = all(  # no state of a later segment is read by an earlier one, so segments can take turns
            any(spec.input in segment.inputs and spec.output in segment.outputs for segment in manifest.segments)
            for spec in manifest.states
        )
        self.capacity = capacity
        self.values: dict[str, ort.OrtValue] = {}
        self.shared: dict[str, ort.OrtValue] = {}
        self.all_grow = all(spec.growing_axis is not None for spec in manifest.states)
        self._kept: dict[str, ort.OrtValue] = {}
        self.reset()

    def reset(self) -> None:
        """Forget the text."""
        self._kept.clear()
        for spec in self._specs:
            shape = _shape(spec, self.capacity if spec.in_place else 0)
            value = self.values.get(spec.input)
            if (
                value is None or not spec.in_place
            ):  # a buffer filled in place needs no clearing: its length says what counts
                value = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, spec.dtype))
            self.values[spec.input] = value
            if spec.in_place:
                self.shared[spec.output] = value

    def keep(self, names: Collection[str]) -> None:
        """Remember, for `cut`, those states among a segment's outputs `names` that do not grow, as they are now."""
        for spec in self._specs:
            if spec.output in names and spec.growing_axis is None:
                self._kept[spec.input] = self.values[spec.input]  # a step makes new ones, and leaves these alone

    def cut(self, tokens: int) -> None:
        """Forget what follows the first `tokens` tokens, at which states that do not grow were last kept."""
        for spec in self._specs:
            if spec.growing_axis is None:
                self.values[spec.input] = self._kept[spec.input]
            elif not spec.in_place:  # of a buffer filled in place the length says what counts
                self.values[spec.input] = ort.OrtValue.ortvalue_from_numpy(self.contents(spec.input, tokens).copy())

    def contents(self, name: str, tokens: int) -> np.ndarray:
        """A copy of the state whose input is `name`, as `tokens` tokens have left it."""
        (spec,) = (spec for spec in self._specs if spec.input == name)
        filled = self.values[name].numpy()
        if spec.growing_axis is None:
            return filled
        return filled[(slice(None),) * spec.growing_axis + (slice(tokens),)]

    def provide(self, values: dict[str, ort.OrtValue], names: Collection[str]) -> None:
        """Put those states among `names` into `values`."""
        values.update((name, self.values[name]) for name in names if name in self.values)

    def advance(self, values: Mapping[str, ort.OrtValue], names: Collection[str]) -> None:
        """Take over those states among `names` that a segment returned anew. Raises DamagedFile for another shape."""
        for spec in self._specs:
            if spec.output in names and not spec.in_place:
                value = values[spec.output]
                if not _fits(spec, value.shape()):
                    raise DamagedFile(spec.output, f"is a state of {value.shape()}, the manifest says {spec.shape}")
                self.values[spec.input] = value


def _fits(spec: State, shape: Sequence[int]) -> bool:
    """Whether a state has the manifest's shape, whatever it has grown to."""
    if len(shape) != len(spec.shape):
        return False
    return all(a == b or axis == spec.growing_axis for axis, (a, b) in enumerate(zip(shape, spec.shape, strict=True)))


def _shape(spec: State, tokens: int) -> tuple[int, ...]:
    return tuple(tokens if axis == spec.growing_axis else size for axis, size in enumerate(spec.shape))
