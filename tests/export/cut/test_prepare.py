"""Rewrites that the quantizer relies on, on graphs made by hand."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from pocketmoe.export.cut.prepare import plain_matmuls

STACKED = """
<ir_version: 10, opset_import: ["" : 20]>
stacked (float[s,3] x) => (float[s,8] y)
<float[4,2,3] weight = {WEIGHT}, int64[2] flat = {8,3}>
{
  rows = Reshape(weight, flat)
  y = Gemm<transB=1>(x, rows)
}
"""


def test_a_stack_of_matrices_in_one_product_is_one_matrix() -> None:
    """JetMoE's attention has experts that are computed all at once: nothing but the product is left of it."""
    weight = np.random.default_rng(0).standard_normal((4, 2, 3)).astype(np.float32)
    text = STACKED.replace("WEIGHT", ",".join(f"{n:.6f}" for n in weight.ravel()))
    model = ir.from_onnx_text(text)
    assert plain_matmuls(model) == 2
    assert [node.op_type for node in model.graph] == ["MatMul"]
    x = np.ones((2, 3), np.float32)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ weight.reshape(8, 3).T, rtol=1e-4, atol=1e-5)
