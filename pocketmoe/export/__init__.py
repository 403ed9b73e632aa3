"""A checkpoint becomes a bundle: capture the graph, cut it at its experts, stream the weights.

card.py          the bundle's model card
convert.py       the entry: checkpoint in, bundle out
early_checks.py  what can be refused before torch is imported
reference.py     the checkpoint as transformers runs it, for bundles to be compared with
"""
