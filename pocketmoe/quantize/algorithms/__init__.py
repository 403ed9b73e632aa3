"""How a matrix becomes integers or four-bit floats: arrays to arrays.

choice.py   the quantization algorithms, by name
float4.py   NF4 and FP4, by bitsandbytes
formats.py  how matrices are stored: bits, blocks, bytes, and back to float32
gptq.py     rounding by what calibration brings to a matrix
nearest.py  arrays to arrays: block-wise integers, plain and searched grids
"""
