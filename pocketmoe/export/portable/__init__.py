"""A bundle as one ONNX model for any stock ONNX Runtime."""
