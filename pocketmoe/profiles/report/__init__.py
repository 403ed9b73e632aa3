"""Profiles as pages and tables."""
