"""Which experts are in memory, and how the others get there."""
