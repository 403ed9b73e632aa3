"""The checks of a quantized bundle, on graphs that the quantizer did not write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from pocketmoe.errors import DamagedFile
from pocketmoe.quantize.checks import check_share


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes"),
    [
        ("MatMulNBits", ["x"], {"K": 4, "N": 4}),  # no codes at all
        ("MatMulNBits", ["x", "x"], {"K": 4, "N": 4}),  # codes that are computed
        ("MatMulNBits", ["x", "w"], {"K": 4}),  # no size
        ("MatMulBnb4", ["x", "w"], {"K": 4, "N": "four"}),  # a size of another type
        ("GatherBlockQuantized", ["w", "x"], {"bits": 0}),
        ("GatherBlockQuantized", [], {}),
    ],
)
def test_a_quantized_operator_without_weights_is_damage(
    tmp_path: Path, operator: str, inputs: list[str], attributes: dict[str, Any]
) -> None:
    """A bundle's own graph may hold such an operator from the start: it is refused by name, not by a traceback."""
    weights = onnx.TensorProto(name="w", data_type=TensorProto.UINT8, dims=[16], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "dense.bin", "offset": "0", "length": "16"}.items():
        weights.external_data.add(key=key, value=value)
    (tmp_path / "dense.bin").write_bytes(bytes(16))
    node = helper.make_node(operator, inputs, ["y"], domain="com.microsoft", **attributes)
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "segment", [value], [result], [weights])
    path = tmp_path / "segment_00.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(DamagedFile, match=f"segment_00.onnx: has a {operator} without quantized weights"):
        check_share([path], planned=0)
