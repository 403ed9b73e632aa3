"""Runs a bundle: segments as sessions, experts paged into slots, one budget for the whole process.

generate.py   ids from an engine, text from ids, the report
run.py        the entry: path and prompt to text and report
sampling.py   logits to a token
tokenizer.py  tokenizer, sandboxed chat template
trace.py      the routing trace: format, recorder, reader that trusts nothing
"""
