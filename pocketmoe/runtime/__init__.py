"""Runs a bundle: segments as sessions, experts paged into slots, one budget for the whole process."""
