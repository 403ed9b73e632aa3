"""Recorded and synthetic routing, and what caches make of it."""
