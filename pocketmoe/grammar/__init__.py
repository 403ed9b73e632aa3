"""Holds an answer to a JSON schema, a regular expression or a grammar, by llguidance (the extra `grammar`).

constraint.py   what an answer is held to, checked before anything is computed
guide.py        a compiled constraint: which tokens may come next, which must
json_schema.py  the keywords of JSON schemas that are held; the others are refused by name
vocabulary.py   the bytes that each token of a tokenizer adds to a text
"""
