"""What the commands share on the terminal: options, numbers, prompts, progress, tables.

batch.py       `run --batch`: its options, and what it says
chat.py        the loop of `chat`: what is typed, and what comes back
keys.py        the keys of a server: from a file or the environment
lines.py       what somebody types: an editor, plain lines, or a pipe
numbers.py     numbers, sizes and paths as users type them: refused before anything is loaded, where nothing can be
options.py     arguments and options that several commands share
plan_table.py  what `plan` says: the answer, named choices, the table they were chosen from
progress.py    a progress bar on stderr
prompt.py      where `run` takes its prompt from: an argument, a file, or standard input, each of any length
serving.py     what `serve` does on the terminal
sampling.py    how to choose tokens, and what an answer is held to, as options of `run` and `chat`
tables.py      reports as aligned text
"""
