"""The one door to ONNX Runtime: every session of the package is made and run here.

What ONNX Runtime refuses, when it loads a graph, when values are bound, or when it computes, comes out as one error
that names the graph. Its own exceptions have no common class, and their texts need not be UTF-8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from pocketmoe.errors import BadInput, GraphRefused, OverBudget, PocketMoEError

CPU = "CPUExecutionProvider"
LEAST = (1, 31)  # of ONNX Runtime

_LONGEST = 300  # characters of an error of ONNX Runtime's
_NO_MEMORY = ("bad_alloc", "Failed to allocate memory", "bad array new length")


def session_options(threads: int, **entries: str) -> ort.SessionOptions:
    """Options for one session of a token's path; `a__b` in an entry's name stands for `a.b`.

    Its threads spin while it runs, since most operators are done before a sleeping thread has woken up, and never
    between runs: whatever spins then takes a core from the experts and from the disk.
    No arena and no memory pattern: both keep peak-sized blocks that a budget cannot see.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.load_model_format", "ONNX")  # never by what a file looks like
    for name, value in entries.items():
        options.add_session_config_entry(name.replace("__", "."), value)
    return options


def refuse_old(version: str) -> None:
    """Raise BadInput for a version of ONNX Runtime that would give wrong results.

    Up to 1.29 an output is gone with the binding that it was bound by: 1.23 and 1.24 answered with what lay in its
    memory afterwards, 1.28 crashed.
    """
    found = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if found < LEAST:
        raise BadInput(
            f"onnxruntime {version} gives wrong results here",
            f"Install {'.'.join(map(str, LEAST))} or newer: pip install 'onnxruntime>={'.'.join(map(str, LEAST))}'.",
        )


class Session:
    """A session on the CPU, checked to be there and nowhere else."""

    def __init__(self, model: str | bytes, options: ort.SessionOptions, graph: Path | str) -> None:
        """`model`: its path or its bytes; `graph`: what errors call it.

        Raises GraphRefused, OverBudget where memory is short, and BadInput where ONNX Runtime is too old.
        """
        self.graph = graph
        refuse_old(ort.__version__)
        try:
            self._session = ort.InferenceSession(model, options, providers=[CPU])
        except Exception as error:
            raise refusal(graph, error) from error
        if self._session.get_providers() != [CPU]:
            raise PocketMoEError(f"ONNX Runtime put {graph} on {self._session.get_providers()} instead of {CPU}")
        self.inputs: list[ort.NodeArg] = list(self._session.get_inputs())
        self.outputs: list[ort.NodeArg] = list(self._session.get_outputs())
        self._binding: ort.IOBinding | None = None

    def run(self, names: Sequence[str] | None, feed: Mapping[str, Any]) -> list[np.ndarray]:
        """The outputs of these names, None for all, for arrays by input name; [...], as the graph says.

        Raises GraphRefused, OverBudget.
        """
        try:
            found = self._session.run(names, feed)
        except Exception as error:
            raise refusal(self.graph, error) from error
        if not all(isinstance(value, np.ndarray) for value in found):
            raise GraphRefused(self.graph, "gives something other than tensors")
        return found

    def run_values(
        self,
        inputs: Sequence[str],
        values: Mapping[str, ort.OrtValue],
        outputs: Sequence[str],
        buffers: Mapping[str, ort.OrtValue],
    ) -> list[ort.OrtValue]:
        """The outputs, which stay in ONNX Runtime; those named in `buffers` are written there.

        Raises GraphRefused, OverBudget.
        """
        try:
            binding = self._binding = self._binding or self._session.io_binding()
            for name in inputs:
                binding.bind_ortvalue_input(name, values[name])
            for name in outputs:
                if name in buffers:
                    binding.bind_ortvalue_output(name, buffers[name])
                else:
                    binding.bind_output(name)
            self._session.run_with_iobinding(binding)
            found = binding.get_outputs()
            binding.clear_binding_inputs()
            binding.clear_binding_outputs()
        except Exception as error:
            raise refusal(self.graph, error) from error
        return found


class Rows:
    """A session with one input [rows, width] and one output of the same shape, both float32.

    A single row goes through buffers that are bound once: a decode step's call costs half as much so.
    """

    def __init__(self, session: Session) -> None:
        """Raises GraphRefused for a graph of another form."""
        self._session = session
        ports = (*session.inputs, *session.outputs)
        shapes = {tuple(port.shape[1:]) for port in ports}
        width = next(iter(shapes))[0] if len(shapes) == 1 and len(ports[0].shape) == 2 else None
        if len(ports) != 2 or not isinstance(width, int) or {port.type for port in ports} != {"tensor(float)"}:
            raise GraphRefused(session.graph, "does not turn float32 [rows, width] into the same")
        self.input = session.inputs[0].name
        self.width = width
        self._single: _SingleRow | None = None

    def run(self, x: np.ndarray) -> np.ndarray:
        """y, float32 [rows, width], for x, float32 [rows, width]; of a single row valid until the next call.

        Raises GraphRefused, OverBudget.
        """
        if len(x) == 1:
            self._single = self._single or _SingleRow(self._session, self.width)
            return self._single.run(x)
        (y,) = self._session.run(None, {self.input: x})
        if y.shape != x.shape:
            raise GraphRefused(self._session.graph, f"made {list(y.shape)} of {list(x.shape)}")
        return y


class _SingleRow:
    def __init__(self, session: Session, width: int) -> None:
        self._graph = session.graph
        self._session = session._session  # pyright: ignore[reportPrivateUsage]
        self._x = np.empty((1, width), np.float32)
        self._y = np.empty((1, width), np.float32)
        try:
            self._binding = self._session.io_binding()
            self._values = [ort.OrtValue.ortvalue_from_numpy(array) for array in (self._x, self._y)]
            self._binding.bind_ortvalue_input(session.inputs[0].name, self._values[0])
            self._binding.bind_ortvalue_output(session.outputs[0].name, self._values[1])
        except Exception as error:
            raise refusal(self._graph, error) from error

    def run(self, x: np.ndarray) -> np.ndarray:
        np.copyto(self._x, x)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise refusal(self._graph, error) from error
        return self._y


def refusal(graph: Path | str, error: Exception) -> PocketMoEError:
    """What ONNX Runtime said of a graph, as one of our errors."""
    text = str(error)
    if isinstance(error, UnicodeDecodeError):  # pybind could not turn its text into a str
        text = bytes(error.object).decode(errors="replace")
    if isinstance(error, MemoryError) or any(sign in text for sign in _NO_MEMORY):
        return OverBudget(f"{graph}: needs more memory than there is for it")
    return GraphRefused(graph, f"is refused by ONNX Runtime: {' '.join(text.split())[:_LONGEST]}")
