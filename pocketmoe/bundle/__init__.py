"""The bundle format: what export writes, quantize rewrites and the runtime reads."""
