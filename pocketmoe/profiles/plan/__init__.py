"""Which scheme and budget fit a machine.

advice.py    the choice among candidates, and what would do where none will
making.py    what getting the bundle takes first: download, disk, export
plan.py      candidates: which scheme and budget fit a machine, at what speed
planning.py  around it: the model read, the machine looked up or measured
"""
