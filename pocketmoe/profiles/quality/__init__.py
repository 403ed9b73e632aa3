"""How well a bundle answers, against itself and against a reference.

divergence.py    KL, agreement, confidence intervals: arrays to numbers
evaluation.py    the entry of `eval`: a bundle by some texts, and its verdicts
free_running.py  greedy answers of both to the same prompts: where they part, whether they are any good
gate.py          limits on those figures: a user's file, and rules that always hold (docs/EVAL.md)
journal.py       what a long evaluation has found so far, for a killed one to go on from
levels.py        what int8 activations change: an answer at two accuracy levels
models.py        what is compared: a bundle's engine, or a checkpoint that is run by transformers
pairs.py         sentences about two groups: the gap in likelihood, and its drift by quantizing
quality.py       texts to windows and prompts, and what they come to
report.py        the figures of an evaluation, made of what windows and prompts came to
scoring.py       one or two engines over the same windows, in lock step
tasks.py         figures of lm-evaluation-harness' tasks, and what gates call them
"""
