"""Quantizing a bundle: schemes (arrays to arrays), the graph rewrite, and their application to a whole bundle.

apply.py          the entry: every weight by its scheme, into a bundle of the same format
calibrated.py     which experts calibration reached; what a bundle keeps of it
checks.py         nothing skipped, nothing broken, or exit 5
dense.py          attention, shared experts, embedding, head
experts.py        experts, one record at a time
float_backend.py  a backend for measuring: buffers, and one session for all experts of a kind
float_expert.py   an expert in float32, run with any weights
kept.py           codes that a checkpoint came with, kept: no weight is rounded again
plan.py           the plan as the bundle keeps it, and the budgets one may ask for
schemes.py        which class of tensors gets which scheme
workers.py        who converts experts: threads here, or Ray's workers anywhere
"""
