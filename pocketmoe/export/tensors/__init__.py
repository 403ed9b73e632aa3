"""Tensors as they are published: files, shards, formats, names, adapters.

adapter.py       loRA adapters, as peft saves them, merged into weights while these are read: W + scaling * (B @ A)
directory.py     a checkpoint's directory: which of its files may be read
fp8.py           weights in eight-bit floats with scales, as they are published
gguf.py          the header of a GGUF file, read within limits
lfs.py           git LFS pointers: what a clone without Git LFS has in the place of large files
names.py         from the names of a checkpoint's tensors to those of a model's parameters, by transformers' own
                 conversion mapping
quantization.py  what a checkpoint says of how its weights are stored, and what its tensors say: the tensors decide
shards.py        the tensors of a checkpoint, by name, from one safetensors file or from shards with an index; read one
                 at a time
"""
