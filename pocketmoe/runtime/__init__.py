"""Runs a bundle: segments as sessions, experts paged into slots, one budget for the whole process.

generate.py      ids from an engine, text from ids, the report
rehearsed.py     whether this machine has loaded a bundle's tokenizer in a child before, kept as a line beside the
                 packed experts
run.py           the entry: path and prompt to text and report
sampling.py      logits to a token
text_stream.py   the text of an answer, piece by piece as its tokens come: no piece is lost, and no bytes make it fail
tokenizer.py     tokenizer, sandboxed chat template
trace.py         the routing trace: format, recorder, reader that trusts nothing
verification.py  everything about a bundle that can be found wrong without running it: what `pocketmoe verify` does
"""
