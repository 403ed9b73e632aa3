"""Weights that are quantized already: how each published format packs them, and what its numbers stand for.

bitsandbytes.py        NF4, FP4 (statistics quantized again or not) and LLM.int8(), as transformers saves them
compressed_tensors.py  integers packed into words or a byte each, and four-bit floats, as llm-compressor saves them
find.py                which tensors of a checkpoint stand for a weight, and in which format: the tensors decide
gguf.py                GGUF's blocks: Q4_0 and Q8_0 as codes, all others by the gguf package
gptq.py                GPTQ and AWQ: codes and zero points packed into words, scales per group of inputs
grid.py                codes on a grid: what all formats come down to, and the arithmetic of their own libraries
modelopt.py            NVFP4 as NVIDIA's ModelOpt saves it
"""
