"""Tokens through segments and experts, within one memory plan.

affinity.py       a CPU for the thread that feeds, helpers elsewhere
cache_routing.py  experts in memory preferred, by choice: a segment's TopK replaced
claims.py         the memory plan as claims on the one budget, in the order in which an engine is opened
engine.py         the walk: segments, experts, segments
kv_cache.py       caches and recurrent states, in place where the graph allows
memory_plan.py    what is fixed, and how many slots the rest pays for
options.py        how to open a bundle: every choice that an engine takes, checked
prefix.py         how much of a text's beginning its states can be taken back to
segments.py       a segment's session; values stay in ONNX Runtime
statistics.py     what an engine counts while it runs: where its steps went, and what was not run
"""
