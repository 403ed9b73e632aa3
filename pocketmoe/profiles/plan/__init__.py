"""Which scheme and budget fit a machine.

plan.py      which scheme and budget fit a machine, at what speed, and what would
planning.py  around it: the model read, the machine looked up or measured
"""
