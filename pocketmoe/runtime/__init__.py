"""Runs a bundle: segments as sessions, experts paged into slots, one budget for the whole process.

answer.py        an answer while it is generated: ids from an engine, text from ids, stop strings
conversation.py  a conversation that keeps its text; the records of an answer
generate.py      an answer with the report of `run`
model.py         a loaded model that answers calls, several at once
rehearsed.py     whether this machine has loaded a bundle's tokenizer in a child before, kept as a line beside the
                 packed experts
run.py           the entry: path and prompt to text and report
sampling.py      logits to a token
stop_strings.py  strings at which an answer is to stop, in a text that arrives in pieces
text_stream.py   the text of an answer, piece by piece as its tokens come: no piece is lost, and no bytes make it fail
tokenizer.py     text to token ids and back; strangers' tokenizers run in a child with limits
trace.py         the routing trace: format, recorder, reader that trusts nothing
verification.py  everything about a bundle that can be found wrong without running it: what `pocketmoe verify` does
"""
