"""Which scheme and budget fit a machine."""
