"""Calls of tools: given to a model by its chat template, read out of what it says, and forced on it by a grammar.

Pure functions and records; nothing here is computed by a model.

arguments.py      the arguments of a call, checked: JSON, Python's literals, or text that a schema gives a type
calls.py          records: a tool, a call, the parts of an answer
families.py       what each family of models writes, told by its chat template
forced.py         grammars that let a model write nothing but calls
harmony.py        the channels of gpt-oss
json_bodies.py    calls that families write as JSON
messages.py       messages as clients write them, as chat templates take them
sections.py       an answer that arrives in pieces: content, reasoning, and sections with calls in them
speech.py         how one answer is written and read: dialect, tools, whether one has to be called
tagged_bodies.py  calls that families write as tags, a parameter each
"""
