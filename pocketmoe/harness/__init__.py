"""A bundle as a model of lm-evaluation-harness: its tasks, run in this process (extra `lm-eval`).

model.py  what the harness asks of a model, answered by an engine
tasks.py  the entry: some tasks, and the figures that they come to
"""
