"""A published checkpoint as transformers reads it: hub, settings, provenance, the model.

checkpoint.py    a checkpoint directory in the hub's layout: its configuration, and its tensors read one at a time
config.py        config.json as it was published, and what of it decides the answers: the configuration that a capture
                 is made from
counting.py      parameters by class of models that their config.json does not tell, on the meta device
front_matter.py  a checkpoint's README.md: the text of its model card, and of the metadata above it (YAML) what a bundle
                 states
gguf.py          a GGUF file as a checkpoint's directory: transformers' configuration and tokenizer, its blocks by name
hub.py           hub ids: downloaded at one commit, errors in one line
provenance.py    origin, model card and hashes of the checkpoint
weights.py       checkpoint names to model names by transformers' own mapping; experts stay on the meta device
"""
