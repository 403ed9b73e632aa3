"""A bundle as a model of lm-evaluation-harness: its tasks, run in this process (extra `lm-eval`).

model.py  what the harness asks of a model, answered by a bundle, or by the checkpoint that it is compared with
tasks.py  tasks found, loaded and run; the figures that they come to
"""
