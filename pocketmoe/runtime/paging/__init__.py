"""Which experts are in memory, and how the others get there.

cache.py          which experts stay: a pure policy that a trace can replay
expert_counts.py  what counts of uses say: how even routing is, what to load first
pager.py          a layer's experts for a walk of chunks: hits run, misses arrive, one lock
prefetch.py       the next layer's router on this layer's state, and whether guessing pays
rate_limiter.py   slows reads down, to test predictions
readers.py        the threads that read: what is wanted first, guesses into idle disk time
workers.py        the threads that help to run a list of experts
"""
