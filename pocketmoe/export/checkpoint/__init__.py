"""A published checkpoint as transformers reads it: files, settings, tensors, tokenizer, template.

directory.py   configuration and tensors of a directory, read one at a time
fp8.py         weights in eight-bit floats with scales, as they are published
hub.py         hub ids: downloaded at one commit, errors in one line
provenance.py  origin, model card and hashes of the checkpoint
tokenizer.py   tokenizer and chat template
weights.py     checkpoint names to model names by transformers' own mapping; experts stay on the meta device
"""
