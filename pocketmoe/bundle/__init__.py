"""The bundle format: what export writes, quantize rewrites and the runtime reads.

files.py       files and directories: put in place whole, read, hashed, synced, exchanged
in_place.py    experts that are kept once: read back from how a machine has packed them
inspection.py  what is in a bundle
manifest.py    the typed, self-sealing manifest, checked before anything it names is used
packed.py      what may lie in a bundle's packed/, and how it is removed
partial.py     directories that are being written, and what killed writers left of theirs
progress.py    the callback by which the library says what it does
reader.py      opening and verifying a bundle
resume.py      how long work goes on where a killed run stopped
store.py       experts.bin: page-aligned records, one direct read each, hashed
stream.py      experts made on every core, written in order, gone on with after a kill
writer.py      publishing a bundle whole or not at all; one with some graphs changed and the rest linked to
"""
