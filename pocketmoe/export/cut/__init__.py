"""The captured graph in pieces: segments, routers, experts, dense weights.

attention.py  attention fused with its cache, fed with one product, turning by itself; caches with room for new tokens
coded.py      the codes of weights that were quantized already, in the shapes in which a bundle stores these weights
dense.py      dense.bin: each weight of the segments once, with its role
experts.py    one expert's graph per kind; records streamed to the store
lengths.py    past length and token count become inputs, so that caches can be filled in place
masks.py      masks that attention applies by itself, and guards that never act: left out
positions.py  positions that depend on the length of the whole text (longrope): what a bundle must say of them
prepare.py    rewrites that the cut and the quantizer rely on
rotary.py     rotary embeddings, however they are written, as one operator, or by attention itself
segments.py   segments between the Experts nodes, a router graph for each layer
views.py      chains of reshapes become one or none
"""
