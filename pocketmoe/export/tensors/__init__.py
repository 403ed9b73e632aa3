"""Tensors as they are published: files, shards, formats, names, adapters.

fp8.py  weights in eight-bit floats with scales, as they are published
lfs.py  git LFS pointers: what a clone without Git LFS has in the place of large files
"""
