"""The captured graph in pieces: segments, routers, experts, dense weights."""
