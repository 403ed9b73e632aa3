"""How a matrix becomes integers or four-bit floats: arrays to arrays."""
