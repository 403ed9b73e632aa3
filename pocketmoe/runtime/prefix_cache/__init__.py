"""Keeps on disk, by choice, what prompts have computed, so that it outlives the process.

cache.py     the states of a text's beginning, kept block by block and put back
entry.py     a file of the cache: its states, and a header that seals them
folder.py    the directory: whose it is, what lies in it, what goes when it is full
identity.py  what decides the bits of a state, and so the names of files
kept.py      what an engine's texts leave there, and find
listing.py   what is in it, by model, and how it is cleared
"""
