"""A published checkpoint as transformers reads it: hub, settings, provenance, the model.

checkpoint.py  a checkpoint directory in the hub's layout: its configuration, and its tensors read one at a time
hub.py         hub ids: downloaded at one commit, errors in one line
provenance.py  origin, model card and hashes of the checkpoint
weights.py     checkpoint names to model names by transformers' own mapping; experts stay on the meta device
"""
