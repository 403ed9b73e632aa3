"""What tokens leave behind for later ones: key and value caches, recurrent states.

A cache that grows is one buffer of the full capacity which the graph fills in place, where it can: it is handed over as
a whole, or as far as the text reaches after the step. Else each step returns a new one. Either way the budget has
promised the full size from the start.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnxruntime as ort

from pocketmoe.bundle.manifest import Segment, State
from pocketmoe.errors import DamagedFile

Fixed = dict[str, ort.OrtValue]  # states that do not grow, by their inputs' names


def state_bytes(specs: Sequence[State], capacity: int, texts: int = 1) -> int:
    """Memory for all states of so many texts of `capacity` tokens, in bytes.

    The copy that a step makes of one of them is included.
    """
    sizes = [spec.nbytes(capacity) for spec in specs]
    copied = [size for spec, size in zip(specs, sizes, strict=True) if not spec.buffered]
    return texts * sum(sizes) + 2 * max(copied, default=0)


def fixed_bytes(specs: Sequence[State]) -> int:
    """Memory for one more copy of a text's states that do not grow, in bytes."""
    return sum(spec.nbytes(1) for spec in specs if spec.growing_axis is None)


def are_local(specs: Sequence[State], segments: Sequence[Segment]) -> bool:
    """Whether each state is read and written by one segment, so that chunks of a text can go through the layers
    together.
    """
    return all(
        any(spec.input in segment.inputs and spec.output in segment.outputs for segment in segments) for spec in specs
    )


class States:
    """The KV caches and recurrent states of one text, as ONNX Runtime values under their graph names.

    Each has the manifest's dtype and shape, such as [1, heads, tokens, head size] for a cache of keys.
    """

    def __init__(self, specs: Sequence[State], capacity: int) -> None:
        """`capacity`: tokens of text."""
        self._specs = specs
        self._buffers: dict[str, np.ndarray] = {}  # the memory of states that are filled in place
        self._with_room = tuple(spec for spec in specs if spec.with_room)
        self.values: dict[str, ort.OrtValue] = {}
        self._shared: dict[str, ort.OrtValue] = {}  # outputs that are written into a buffer
        self.all_grow = all(spec.growing_axis is not None for spec in specs)
        for spec in specs:
            if spec.buffered:
                self._buffers[spec.input] = np.zeros(_shape(spec, capacity), spec.dtype)  # takes memory as it is filled
            if spec.in_place:
                self.values[spec.input] = ort.OrtValue.ortvalue_from_numpy(self._buffers[spec.input])
                self._shared[spec.output] = self.values[spec.input]
        self.reset()

    def reset(self) -> None:
        """Forget the text."""
        for spec in self._specs:
            if not spec.buffered:  # of a buffer filled in place the length of the text says what counts
                self.values[spec.input] = ort.OrtValue.ortvalue_from_numpy(np.zeros(_shape(spec, 0), spec.dtype))

    def fixed(self, names: Collection[str] | None = None) -> Fixed:
        """The states that do not grow, or those of them among a segment's outputs `names`, as they are now.

        A step makes new ones, and leaves these alone.
        """
        wanted = (spec for spec in self._specs if spec.growing_axis is None)
        return {spec.input: self.values[spec.input] for spec in wanted if names is None or spec.output in names}

    def cut(self, tokens: int, fixed: Fixed) -> None:
        """Forget what follows the first `tokens` tokens, after which the states that do not grow were `fixed`."""
        self.values |= fixed
        for spec in self._specs:
            if spec.growing_axis is not None and not spec.buffered:
                self.values[spec.input] = ort.OrtValue.ortvalue_from_numpy(self.contents(spec.input, tokens).copy())

    def contents(self, name: str, tokens: int) -> np.ndarray:
        """The state whose input is `name`, of the manifest's shape and dtype, after `tokens` tokens.

        Of a state that does not grow: as it is now. Valid until the text changes.
        """
        (spec,) = (spec for spec in self._specs if spec.input == name)
        filled = self._buffers[name] if spec.buffered else self.values[name].numpy()
        if spec.growing_axis is None:
            return filled
        return filled[_first(spec, tokens)]

    def buffers(self) -> dict[str, np.ndarray]:
        """All states as they lie in memory, in C order; those that grow as long as the text, or longer."""
        return {
            spec.input: self._buffers[spec.input] if spec.buffered else self.values[spec.input].numpy()
            for spec in self._specs
        }

    def make_room(self, tokens: int) -> dict[str, np.ndarray]:
        """The same after `reset`, for a text of `tokens` tokens whose states are written there."""
        for spec in self._specs:
            if spec.growing_axis is not None and not spec.buffered:
                empty = np.zeros(_shape(spec, tokens), spec.dtype)
                self.values[spec.input] = ort.OrtValue.ortvalue_from_numpy(empty)
        return self.buffers()

    def copy(self, other: States, tokens: int) -> None:
        """Take over what another text with states of the same kind has left of its first `tokens` tokens in caches."""
        for spec in self._specs:
            if spec.growing_axis is None:
                continue
            array = other.contents(spec.input, tokens)
            if spec.buffered:
                self._buffers[spec.input][_first(spec, tokens)] = array
            else:
                self.values[spec.input] = ort.OrtValue.ortvalue_from_numpy(array.copy())

    def with_room(self, tokens: int) -> dict[str, ort.OrtValue]:
        """For a chunk after which the text has `tokens` tokens: the states that the graph wants so long."""
        return {
            spec.input: ort.OrtValue.ortvalue_from_numpy(self._buffers[spec.input][_first(spec, tokens)])
            for spec in self._with_room
        }

    def targets(self, values: Mapping[str, ort.OrtValue]) -> Mapping[str, ort.OrtValue]:
        """Where outputs are written that are one buffer with an input, for a chunk with these values."""
        if not self._with_room:
            return self._shared
        own = {spec.output: values[spec.input] for spec in self._with_room if spec.input in values}
        return {**self._shared, **own}

    def provide(self, values: dict[str, ort.OrtValue], names: Collection[str]) -> None:
        """Put those states among `names` into `values`."""
        values.update((name, self.values[name]) for name in names if name in self.values)

    def advance(self, values: Mapping[str, ort.OrtValue], names: Collection[str]) -> None:
        """Take over those states among `names` that a segment returned anew. Raises DamagedFile for another shape."""
        for spec in self._specs:
            if spec.output in names and not spec.buffered:
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


def _first(spec: State, tokens: int) -> tuple[slice, ...]:
    """The part of a state that grows which the first `tokens` tokens have left."""
    assert spec.growing_axis is not None, "a state that does not grow has no part"
    return (slice(None),) * spec.growing_axis + (slice(tokens),)
