"""Rewrites of a bundle's graphs."""
