# What PocketMoE uses of ONNX Runtime, which publishes no types. In the order of a session's life.

from collections.abc import Mapping, Sequence
from enum import Enum
from os import PathLike
from typing import Any

import numpy as np

__version__: str

def get_available_providers() -> list[str]: ...

class GraphOptimizationLevel(Enum):
    ORT_DISABLE_ALL = 0
    ORT_ENABLE_BASIC = 1
    ORT_ENABLE_EXTENDED = 2
    ORT_ENABLE_LAYOUT = 3
    ORT_ENABLE_ALL = 99

class SessionOptions:
    intra_op_num_threads: int
    inter_op_num_threads: int
    log_severity_level: int
    enable_cpu_mem_arena: bool
    enable_mem_pattern: bool
    graph_optimization_level: GraphOptimizationLevel
    optimized_model_filepath: str
    def add_session_config_entry(self, name: str, value: str) -> None: ...
    def add_initializer(self, name: str, value: OrtValue) -> None: ...
    def add_external_initializers_from_files_in_memory(
        self, names: Sequence[str], contents: Sequence[bytes | memoryview], sizes: Sequence[int]
    ) -> None: ...

class NodeArg:
    name: str
    type: str  # "tensor(float)"
    shape: list[int | str | None]  # a length that is not fixed has a name or none

class OrtValue:
    @staticmethod
    def ortvalue_from_numpy(numpy_obj: np.ndarray) -> OrtValue: ...
    @staticmethod
    def ortvalue_from_numpy_with_onnx_type(data: np.ndarray, onnx_element_type: int) -> OrtValue: ...
    def numpy(self) -> np.ndarray: ...
    def shape(self) -> list[int]: ...

class IOBinding:
    def bind_ortvalue_input(self, name: str, ortvalue: OrtValue) -> None: ...
    def bind_ortvalue_output(self, name: str, ortvalue: OrtValue) -> None: ...
    def bind_output(self, name: str) -> None: ...
    def get_outputs(self) -> list[OrtValue]: ...
    def clear_binding_inputs(self) -> None: ...
    def clear_binding_outputs(self) -> None: ...

class InferenceSession:
    def __init__(
        self,
        path_or_bytes: str | bytes | PathLike[str],
        sess_options: SessionOptions | None = None,
        providers: Sequence[str] | None = None,
    ) -> None: ...
    def get_providers(self) -> list[str]: ...
    def get_inputs(self) -> list[NodeArg]: ...
    def get_outputs(self) -> list[NodeArg]: ...
    def run(
        self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any]
    ) -> list[Any]: ...  # arrays; of graphs that make sequences or maps, lists and dicts
    def io_binding(self) -> IOBinding: ...
    def run_with_iobinding(self, iobinding: IOBinding) -> None: ...
