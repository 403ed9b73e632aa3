"""Checkpoints in the states in which people publish them, each with what must come of it (`docs/checkpoints.md`)."""
