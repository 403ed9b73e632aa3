"""Rewrites of a bundle's graphs.

caches.py   key and value caches in int8: scales, and the rewrite of the attention
outputs.py  a copy of a bundle that also gives what goes into its matrices
rewrite.py  the graph rewrite to MatMulNBits, MatMulBnb4 and GatherBlockQuantized
"""
