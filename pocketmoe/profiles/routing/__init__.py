"""Recorded and synthetic routing, and what caches make of it.

policies.py   cache policies over a trace, Belady's optimum and the product's own among them
replay.py     a recorded trace at other budgets: hits, bytes, distance to the optimum
synthetic.py  routing with the statistics of real models (`profiles/routing.toml`)
"""
