"""Tensors as they are published: files, shards, formats, names, adapters."""
