"""Tokens through segments and experts, within one memory plan.

affinity.py       a CPU for the thread that calls, helpers elsewhere
cache_routing.py  experts in memory preferred, by choice: a segment's TopK replaced
claims.py         the memory plan as claims on the one budget, in the order in which an engine is opened
engine.py         tokens through segments, experts, segments
kv_cache.py       caches and recurrent states, in place where the graph allows
memory_plan.py    what is fixed, and how many slots the rest pays for
opening.py        a bundle taken apart once, each part given what it needs
options.py        how to open a bundle: every choice that an engine takes, checked
scheduler.py      several callers' texts, a token of each at a step, prompts in chunks
segments.py       the graphs between the experts; values stay in ONNX Runtime
sequence.py       one text: its tokens, its states, and how much of its beginning is kept
statistics.py     what an engine counts while it runs: where its steps went, and what was not run
"""
