"""Which experts are in memory, and how the others get there.

cache.py          which experts stay: a pure policy that a trace can replay
expert_counts.py  what counts of uses say: how even routing is, what to load first
pager.py          a layer's experts for a batch of chunks: hits run, misses arrive, one lock
prefetch.py       the next layer's router on this layer's state, and whether prefetching pays
rate_limiter.py   slows reads down, to test predictions
readers.py        the threads that read: first what is wanted, then prefetches while the disk is idle
workers.py        the threads that help to run a list of experts
"""
