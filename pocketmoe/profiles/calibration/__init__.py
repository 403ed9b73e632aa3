"""What a text shows of a bundle: inputs of its experts, ranges of its caches, reference logits.

cache_ranges.py      how large the numbers in caches get on a text: what int8 caches are calibrated by
calibrate.py         a text through the experts: what they were given, and how much layers matter
reference_logits.py  a bundle's answers to a text, kept, and how far variants are from them
"""
