"""One ONNX graph of a whole model, its experts as a custom operator."""
