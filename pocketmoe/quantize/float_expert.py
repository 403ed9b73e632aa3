"""One kind of expert in float32, run with any weights: what goes into each matrix, and what a change of one does."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pocketmoe.bundle.manifest import ExpertKind
from pocketmoe.errors import DamagedFile
from pocketmoe.ort import Session, session_options
from pocketmoe.quantize.graphs.rewrite import Use, externals, find_uses, load

Floats = npt.NDArray[np.float32]


class FloatExpert:
    """The graph of a kind of expert with its weights as inputs, so that one session runs every expert of the kind.

    Safe to use from several threads, and can be sent to other processes.
    """

    def __init__(self, path: Path, kind: ExpertKind) -> None:
        """`path`: the kind's graph. Raises DamagedFile."""
        model = load(path)
        self._path = path
        uses = find_uses(model)
        self.uses: dict[str, Use] = {t.name: uses[t.name] for t in kind.tensors if t.name in uses}
        self.kind = kind
        graph = model.graph
        values = {name: graph.initializers[name] for name in externals(model)}
        activations = {name: _input_of(value) for name, value in values.items() if name in self.uses}
        (x,) = graph.inputs
        width = None if x.shape is None else x.shape[1]
        if not isinstance(width, int):  # an expert may be narrower than the model
            raise DamagedFile(path, "does not say how wide its input is")
        self.width = width
        self._x, self._y = str(x.name), str(graph.outputs[0].name)
        for name, value in values.items():
            del graph.initializers[name]
            value.const_value = None
            graph.inputs.append(value)
        known = {self._x, self._y}
        for activation in activations.values():
            if activation.name not in known:
                known.add(str(activation.name))
                graph.outputs.append(activation)
        self._activations = {name: str(activation.name) for name, activation in activations.items()}
        self._model = ir.to_proto(model).SerializeToString()
        self._local = threading.local()

    def weights(self, record: memoryview) -> dict[str, np.ndarray]:
        """A record's tensors by name, not copied, in the kind's shapes (a matrix [N, K] or [K, N]) and dtypes."""
        return {
            t.name: np.frombuffer(
                record, t.dtype, offset=t.offset, count=t.nbytes // np.dtype(t.dtype).itemsize
            ).reshape(t.shape)
            for t in self.kind.tensors
        }

    def run(self, weights: Mapping[str, np.ndarray], x: Floats) -> Floats:
        """y, float32 [rows, width], of an expert with these weights for x, float32 [rows, width].

        Raises GraphRefused.
        """
        return self._fetch(self._y, weights, x)

    def inputs_of(self, matrix: str, weights: Mapping[str, np.ndarray], x: Floats) -> Floats:
        """What goes into one of its matrices, float32 [rows, K]."""
        activation = self._activations[matrix]
        return x if activation == self._x else self._fetch(activation, weights, x)

    def _fetch(self, name: str, weights: Mapping[str, np.ndarray], x: Floats) -> Floats:
        (found,) = self._session().run([name], {self._x: x, **weights})
        return found

    def _session(self) -> Session:
        if not hasattr(self._local, "session"):
            options = session_options(threads=1)
            options.enable_cpu_mem_arena = True  # thousands of runs of one shape, within no budget
            self._local.session = Session(self._model, options, self._path)
        return self._local.session

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_local"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()


def _input_of(value: ir.Value) -> ir.Value:
    """What a matrix is multiplied with; where it is used twice, in its first use."""
    node = next(iter(value.uses())).node
    source = node.inputs[0]
    assert source is not None
    return source
