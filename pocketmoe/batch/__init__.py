"""Many prompts from a file, answered into a file that a second start goes on with.

answering.py  the prompts that have no answer yet, through one loaded model, several at once
prompts.py    the prompts of a file: lines of text, or of JSON
results.py    the file of answers: whole lines, each with a hash of what it answers
"""
